"""What conftest.py promises, seen by a suite of its own in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

OFFLINE = """
import socket
import pytest

def test_swallowed():
    with socket.socket() as client:
        client.settimeout(0.1)
        try:
            client.connect(("203.0.113.1", 80))
        except OSError:
            pass

def test_lookup():
    with pytest.raises(OSError):
        socket.getaddrinfo("example.org", 443)

def test_loopback():
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname()):
        server.close()

def test_folders(golden):
    pass

def test_no_folder(real_data):
    pass
"""


def test_a_test_that_uses_the_network_fails_and_absent_data_skips_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_offline.py").write_text(OFFLINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"NEXUS_DATA": str(tmp_path / "nowhere")},
    )
    assert "3 passed, 2 skipped, 2 errors" in done.stdout, done.stdout
    assert "the test used the network: connect to 203.0.113.1" in done.stdout
    assert "the test used the network: getaddrinfo to example.org" in done.stdout
    assert "NEXUS_GOLDEN is not set" in done.stdout
    assert f"NEXUS_DATA is {tmp_path / 'nowhere'}, which is no folder" in done.stdout
