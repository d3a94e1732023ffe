"""Run milvus-lite 2.5 as a server until standard input ends; prints its port. Needs the packages of .venv-milvus.

It stores float16 vectors, which neither the whole server of that environment nor milvus-lite 3 does.
"""

import socket
import sys
from pathlib import Path

from milvus_lite.server import Server

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
server = Server(str(folder / "half.db"), f"127.0.0.1:{port}")
if not (server.init() and server.start()):
    sys.exit("milvus-lite does not start")
try:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.read()
finally:
    server.stop()
