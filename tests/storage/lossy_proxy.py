"""A proxy between client and PostgreSQL that can lose the server's reply to one COMMIT, as a broken network would."""

import socket
import socketserver
import threading
from pathlib import Path
from typing import Any


class LossyProxy:
    """Listens in `folder` as PostgreSQL would and forwards to the server in `server_folder`."""

    def __init__(self, folder: Path, server_folder: Path, port: int) -> None:
        self.folder = folder
        self.num_lost = 0
        self._is_armed = False
        proxy = self
        name = f".s.PGSQL.{port}"  # what PostgreSQL's clients look for

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.socket(socket.AF_UNIX) as server:
                    server.connect(str(server_folder / name))
                    proxy._forward(self.request, server)

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server(str(folder / name), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def lose_next_commit(self) -> None:
        """The next COMMIT reaches the server and is carried out, but the client loses its connection instead."""
        self._is_armed = True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        replies = threading.Thread(target=_copy, args=(server, client), daemon=True)
        is_losing = False
        replies.start()
        while data := _receive(client):
            is_losing = self._is_armed and b"COMMIT" in data
            if is_losing:
                break
            server.sendall(data)
        if not is_losing:
            server.shutdown(socket.SHUT_WR)
            replies.join()
            return
        self._is_armed = False
        self.num_lost += 1
        # The client hears nothing more. The server answers a COMMIT only when it is done: its end-of-file, after it
        # has been told that no more will come, means that the transaction is in.
        client.shutdown(socket.SHUT_RDWR)
        server.sendall(data)
        server.shutdown(socket.SHUT_WR)
        replies.join()


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


def _copy(source: socket.socket, target: Any) -> None:
    """To the end of `source`, also when `target` is gone."""
    while data := _receive(source):
        try:
            target.sendall(data)
        except OSError:
            continue
    try:
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return
