"""Run a Milvus server until standard input ends; prints its port. Needs the packages of .venv-milvus.

So it ends with the process that started it, however that ends. All its ports are free ones, etcd's too, which does
not look at Milvus' own settings. It looks more often than usual for collections to load, which saves seconds each.
"""

import json
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

from milvus import MilvusServer, MilvusServerConfig


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


folder = Path(sys.argv[1])
folder.mkdir(parents=True)
config = MilvusServerConfig(data_dir=str(folder))
for name, (kind, _) in config.configurable_items.items():
    if kind is int and name.endswith("_port"):
        config.configs[name] = free_port()
client, peer = (f"http://localhost:{port}" for port in (config.configs["etcd_port"], free_port()))
etcd = folder / "etcd.json"
etcd.write_text(
    json.dumps(
        {
            "name": "default",
            "data-dir": str(folder / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "log-outputs": [str(folder / "etcd.log")],
        }
    )
)
os.environ["ETCD_CONFIG_PATH"] = str(etcd)
config.set("common.security.authorizationEnabled", True)
server = MilvusServer(config, wait_for_started=False)
server.webservice_port = free_port()
try:
    server.start()
    health = f"http://127.0.0.1:{server.webservice_port}/healthz"
    while server.server_proc.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=5) as answer:
                if b"OK" in answer.read():
                    break
        except OSError:
            time.sleep(0.1)
    else:
        sys.exit(f"the server ended: {(folder / 'logs' / 'milvus-stderr.log').read_text()[-2000:]}")
    sys.stdout.write(f"{config.configs['proxy_port']}\n")
    sys.stdout.flush()
    sys.stdin.read()
finally:
    server.stop()
