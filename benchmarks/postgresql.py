"""A PostgreSQL server for tests and benchmarks: a new cluster in a temporary directory, on a free port of the loopback interface."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks.contenders import free_port

if TYPE_CHECKING:
    from types import TracebackType

_CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
shared_buffers = 16MB
max_connections = 100
fsync = off
"""


def programs() -> Path | None:
    """Return the directory of the newest installed server."""
    directories = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(directories, key=lambda path: int(path.parent.name), default=None)


class PostgreSQL:
    """A running server. A context manager that stops it and removes its files."""

    def __init__(self, directory: Path) -> None:
        found = programs()
        if found is None:
            raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
        self._programs = found
        self._directory = directory
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.port = free_port()

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True)
        if self._user is not None:
            shutil.chown(self._directory, self._user)
            for parent in self._directory.parents:  # of pytest, which only root can enter
                if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o011)
        self._run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        with (self._directory / "postgresql.conf").open("a") as stream:
            stream.write(f"{_CONFIG}port = {self.port}\n")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory)

    def start(self) -> None:
        self._run("pg_ctl", "--wait", "--silent", f"--log={self._directory / 'log'}", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "--wait", "--silent", "--mode=immediate", "stop")

    def create_schema(self) -> str:
        """Create an empty schema, which takes much less time than a database, and return the URL that uses it."""
        import psycopg

        url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{url}?options=-csearch_path%3D{name}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, f"--pgdata={self._directory}", *arguments],
            check=True,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            timeout=120,
        )
