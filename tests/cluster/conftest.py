import contextlib
import secrets
import subprocess

import pytest
from engines import contents, ip, make_model

import fastopt as fo


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def alone(model, tmp_path):
    """The files that one process writes."""
    fo.pack_file(model, tmp_path / "alone", bits=4)
    return contents(tmp_path / "alone")


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces, linked to this one and to each other; gives their names, and two bytes of addresses.

    This side has the addresses NET.0.1 and NET.1.1, the other side of these links NET.0.2 and NET.1.2, and the link
    between the two, which both call eth1, NET.2.1 and NET.2.2.
    """
    own, net = secrets.token_hex(3), f"10.{20 + secrets.randbelow(200)}"
    names = [f"fastopt-{own}-a", f"fastopt-{own}-b"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth1", "netns", names[0], "type", "veth", "peer", "eth1", "netns", names[1])
        for i, name in enumerate(names):
            link = f"fo{own}{i}"
            ip("link", "add", link, "type", "veth", "peer", "eth0", "netns", name)
            ip("address", "add", f"{net}.{i}.1/24", "dev", link)
            ip("link", "set", link, "up")
            for device in ("lo", "eth0", "eth1"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "address", "add", f"{net}.{i}.2/24", "dev", "eth0")
            ip("-n", name, "address", "add", f"{net}.2.{i + 1}/24", "dev", "eth1")
            ip("-n", name, "route", "add", "default", "via", f"{net}.{i}.1")
        yield names, net
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {getattr(error, 'stderr', error)}")
    finally:
        for name in names:  # its link disappears with it
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)
