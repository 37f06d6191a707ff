"""A window in a process of its own, talked to over its socket with exactly the bytes that a test gives."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.command_line import environment

Reply = tuple[int, dict[str, str], bytes]


class Window:
    """Serves `home` until `end`; `words` are port, address to listen at, and password or ''."""

    def __init__(self, home: Path, *words: str) -> None:
        code = (
            "import sys; from pathlib import Path; from app.server import serve;"
            "port, listen, password = sys.argv[2:5];"
            "serve(Path(sys.argv[1]), int(port), listen, 'none', password or None, say=lambda text: print(text, flush=True))"
        )
        command = [sys.executable, "-P", "-c", code, str(home), *words]
        self.process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        self.home = home
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/", self.said)
        assert found, (self.said, self.process.communicate(timeout=60))
        self.url, self.port = found[0], int(found[1])

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        """Headers with _ for -; Host is our own unless told, and no other header is sent."""
        sent = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def end(self) -> str:
        """Ends it as Ctrl-C does; returns what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.communicate(timeout=60)[1]
        finally:
            self.process.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def raw(port: int, request: bytes, most: int = 1 << 20) -> bytes:
    """Sends bytes that no HTTP library would, and returns the answer; empty when the connection is closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        try:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # closed on us while we talk
            pass
        answer = b""
        try:
            while len(answer) < most and (piece := sock.recv(65536)):
                answer += piece
        except OSError:
            pass
        return answer
