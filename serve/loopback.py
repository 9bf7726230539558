"""What Ray Serve opens to other machines in every replica, closed."""

from typing import Any


def keep_handle_port_on_loopback() -> None:
    """Have the server for calls between deployments, of which there are none, listen on loopback alone.

    Serve 2.60 binds it to every interface and has no setting for it; it takes pickled arguments, so it must not be
    reachable from other machines.
    """
    from ray.serve._private import replica

    module: Any = replica
    add_port = module.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace("[::]", "127.0.0.1"))
        return port

    module.add_port_to_grpc_server = add_loopback_port
