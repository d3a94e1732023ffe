"""Run a Milvus server until standard input ends; prints its port. Needs the packages of .venv-milvus.

It ends with the process that started it, however that ends. Its coordinator looks more often than usual for
collections to load, which saves seconds a collection.
"""

import sys

from milvus import MilvusServer, MilvusServerConfig

config = MilvusServerConfig(data_dir=sys.argv[1])
config.set("common.security.authorizationEnabled", True)
config.set("queryCoord.checkInterval", 50)
config.set("queryCoord.distPullInterval", 50)
server = MilvusServer(config)
try:
    server.start()
    print(server.listen_port, flush=True)
    sys.stdin.read()
finally:
    server.stop()
