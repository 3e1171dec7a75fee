"""How backend ``jaccl`` is configured: variables, the file of devices, mesh and ring.

May live here: ``rt.config_rdma``. May not: verbs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rt.config import RingConfig
from rt.config_rdma import is_mesh, is_ring, resolve_rdma
from rt.errors import ConfigError
from rt.queue_pairs import all_gather_by

MESH: Any = [[None, "a", ["b"]], ["c", None, "d"], ["e", "f", None]]
RING: Any = [[None, "a", None, "b"], ["c", None, "d", None], [None, "e", None, "f"], ["g", None, "h", None]]
RT = {"RT_RANK": "1", "RT_COORDINATOR": "10.0.0.1:5000", "RT_SECRET": "0123456789abcdef"}


def write(folder: Path, matrix: Any) -> str:
    path = folder / "devices.json"
    path.write_text(json.dumps(matrix))
    return str(path)


def resolve(environ: dict[str, str], **keywords: Any) -> RingConfig:
    found = resolve_rdma(environ=environ, **keywords)
    assert found is not None and found.rdma is not None
    return found


def failure(environ: dict[str, str], **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_rdma(environ=environ, **keywords)
    return str(caught.value)


def test_a_mesh_from_a_file(tmp_path: Path) -> None:
    found = resolve({**RT, "RT_IBV_DEVICES": write(tmp_path, MESH)})
    assert (found.rank, found.size, found.coordinator, found.shm) == (1, 3, ("10.0.0.1", 5000), False)
    assert found.rdma is not None and not found.rdma.ring and found.rdma.names(0, 2) == ("b",)
    assert all(found.rdma.connected(a, b, 3) for a in range(3) for b in range(3) if a != b)


@pytest.mark.parametrize("prefix", ("JACCL", "MLX"))
def test_the_names_of_mlx(tmp_path: Path, prefix: str) -> None:
    coordinator = {"JACCL": "JACCL_COORDINATOR", "MLX": "MLX_JACCL_COORDINATOR"}[prefix]
    place = {f"{prefix}_RANK": "2", f"{prefix}_IBV_DEVICES": write(tmp_path, MESH), coordinator: "10.0.0.1:5000"}
    found = resolve({**place, "RT_SECRET": RT["RT_SECRET"]})
    assert (found.rank, found.size, found.coordinator) == (2, 3, ("10.0.0.1", 5000))


def test_precedence(tmp_path: Path) -> None:
    other = {"MLX_IBV_DEVICES": "/nowhere", "RT_JACCL_COORDINATOR": "10.0.0.2:1", "RT_HOSTFILE": "/nowhere", "MLX_HOSTFILE": "/nowhere"}
    found = resolve({**RT, **other, "RT_IBV_DEVICES": write(tmp_path, MESH)})
    assert found.coordinator == ("10.0.0.1", 5000)
    assert resolve({**RT, **other}, device="mlx5_0", world_size=2).rdma.names(0, 1) == ("mlx5_0",)  # type: ignore[union-attr]


def test_without_a_file_a_device_is_looked_for() -> None:
    found = resolve({**RT, "RT_WORLD_SIZE": "2"})
    assert found.rdma is not None and found.rdma.names(0, 1) == ("auto",)
    assert resolve_rdma(environ={}) is None


def test_a_ring(tmp_path: Path) -> None:
    found = resolve({**RT, "RT_IBV_DEVICES": write(tmp_path, RING)})
    assert found.rdma is not None and found.rdma.ring and not found.rdma.connected(0, 2, 4) and found.rdma.connected(3, 0, 4)
    preferred = {"RT_JACCL_RING": True, "JACCL_RING": True, "MLX_JACCL_RING": True}
    for name in preferred:
        assert resolve({**RT, "RT_IBV_DEVICES": write(tmp_path, MESH), name: "1"}).rdma.ring  # type: ignore[union-attr]
    assert not resolve({**RT, "RT_IBV_DEVICES": write(tmp_path, MESH), "RT_JACCL_RING": "0", "MLX_JACCL_RING": ""}).rdma.ring  # type: ignore[union-attr]


def test_mesh_and_ring() -> None:
    def names(matrix: Any) -> Any:
        return tuple(tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in row) for row in matrix)

    assert is_mesh(names(MESH)) and is_ring(names(MESH))
    assert not is_mesh(names(RING)) and is_ring(names(RING))
    assert not is_ring(names([[None, ["a", "b"], "c"], [["d", "e"], None, "f"], ["g", "h", None]]))


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ({}, ": found {}, expected a JSON list with a list per rank"),
        ([], ": found [], expected a JSON list with a list per rank"),
        ([[None, "a"], "b"], ': row [1]: found "b", expected a list of 2, one for each rank'),
        ([[None, "a"], [None]], ": row [1]: found 1 entries, expected a list of 2"),
        ([[None, 1], ["a", None]], ": [0][1]: found 1, expected null, the name of a device, or a list of names"),
        ([["x", "a"], ["b", None]], ": [0][0]: found 'x', expected null: a rank needs no device to itself"),
        ([[None, ["a", "b"]], ["c", None]], ": [0][1]: found 2 devices, expected 1, as many as at [1][0]"),
        (
            [[None, "a", None], ["b", None, None], [None, None, None]],
            ": found neither a mesh nor a ring, expected a device at [0][2]: towards each rank (mesh), or at least towards both neighbours",
        ),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, matrix: Any, said: str) -> None:
    path = write(tmp_path, matrix)
    assert failure({**RT, "RT_IBV_DEVICES": path}).startswith(f"RT_IBV_DEVICES {path}{said}")


def test_other_errors(tmp_path: Path) -> None:
    path = write(tmp_path, MESH)
    assert failure({**RT, "RT_IBV_DEVICES": path, "RT_WORLD_SIZE": "2"}).startswith(f"RT_IBV_DEVICES {path}: found 3 ranks, expected 2")
    assert failure({**RT, "RT_IBV_DEVICES": path, "RT_JACCL_RING": "yes"}) == "RT_JACCL_RING: found 'yes', expected 1 or 0"
    assert failure({**RT, "RT_WORLD_SIZE": "2"}, device="") == "keyword device: found '', expected the name of an RDMA device, or 'auto'"
    assert failure({"RT_IBV_DEVICES": path, "RT_RANK": "0"}).startswith("RT_RANK")  # no coordinator
    with pytest.raises(TypeError, match="all_gather_factory must be a function"):
        resolve_rdma(environ=RT, all_gather_factory=3)  # type: ignore[arg-type]


def test_an_exchange_by_equal_pieces() -> None:
    """Ranks have values of different lengths; the function gathers equally many bytes of each."""
    values = [{"a": 1}, ["much", "longer", "than", "that"]]
    texts = [json.dumps(value).encode() for value in values]
    calls: list[int] = []

    def gather(mine: bytes, nbytes: int) -> bytes:
        calls.append(nbytes)
        if nbytes == 8:
            return b"".join(len(text).to_bytes(8, "little") for text in texts)
        return b"".join(text.ljust(nbytes) for text in texts)

    assert all_gather_by(gather, 2, values[0]) == values and calls == [8, len(texts[1])]
    with pytest.raises(ValueError, match="Custom all-gather returned 3 bytes but expected 16"):
        all_gather_by(lambda mine, nbytes: b"abc", 2, 0)
