"""What configures the ring, what wins, and what every mistake is answered with.

May live here: tests of ``rt/config.py`` against dictionaries and files. May not: connections, the real environment (it is never read here).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rt.backends import choose_backend, is_available
from rt.config import RingConfig, resolve_ring
from rt.errors import ConfigError
from transports import nccl

SECRET = {"RT_SECRET": "sixteen characters"}
RING = [["127.0.0.1:5000", "127.0.0.1:5001"], ["127.0.0.1:5002", "127.0.0.1:5003"]]
RT = {"RT_RANK": "1", "RT_WORLD_SIZE": "4", "RT_COORDINATOR": "10.0.0.1:4000"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29500"}
AGENT = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "run"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "5"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "6"}
SLURM = {"SLURM_PROCID": "4", "SLURM_NTASKS": "7"}


def resolve(environ: dict[str, str], **keywords: Any) -> RingConfig:
    config = resolve_ring(environ={**SECRET, **environ}, **keywords)
    assert config is not None
    return config


def failure(environ: dict[str, str], **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_ring(environ={**SECRET, **environ}, **keywords)
    text = str(caught.value)
    assert "\n" not in text and ": found " in text and ", expected " in text and SECRET["RT_SECRET"] not in text
    return text


@pytest.fixture
def ring(tmp_path: Path) -> str:
    return write(tmp_path, RING)


def write(folder: Path, content: object) -> str:
    path = folder / "ring.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
        {**OPEN_MPI, **MPICH, **SLURM},
        {"RT_CONNECT_TIMEOUT": "5", "RT_TIMEOUT": "5", "RT_CONNECTIONS_PER_IP": "2", "RT_JOB_ID": "j", "RT_INSECURE": "1"},
        {"MLX_RING_VERBOSE": "1", "MLX_WORLD_SIZE": "2"},
    ],
)
def test_nothing_configures_nothing(environ: dict[str, str]) -> None:
    assert resolve_ring(environ=environ) is None
    assert resolve_ring(environ=environ, timeout=3.0, secret="sixteen characters") is None


def test_ring_file(ring: str) -> None:
    config = resolve({"RT_RANK": "1", "RT_HOSTFILE": ring})
    assert (config.rank, config.size, config.connections, config.source) == (1, 2, 2, "RT_RANK, RT_HOSTFILE")
    assert config.addresses == ((("127.0.0.1", 5000), ("127.0.0.1", 5001)), (("127.0.0.1", 5002), ("127.0.0.1", 5003)))
    assert config.coordinator is None and config.store is None and config.coordinator_fd is None


def test_coordinator() -> None:
    config = resolve(RT)
    assert (config.rank, config.size, config.coordinator) == (1, 4, ("10.0.0.1", 4000))
    assert (config.addresses, config.store, config.connections) == (None, None, 1)
    assert (config.connect_timeout, config.timeout, config.source) == (60.0, None, "RT_RANK, RT_WORLD_SIZE, RT_COORDINATOR")


def test_keywords_need_no_environment(ring: str) -> None:
    config = resolve({}, rank=3, world_size=4, coordinator="host:1", connections_per_ip=2, connect_timeout=1.5, timeout=2)
    assert (config.rank, config.size, config.coordinator, config.source) == (3, 4, ("host", 1), "keywords")
    assert (config.connections, config.connect_timeout, config.timeout) == (2, 1.5, 2.0)
    assert resolve({}, rank=0, hostfile=Path(ring)).size == 2


def test_mlx(ring: str) -> None:
    config = resolve({"MLX_RANK": "1", "MLX_HOSTFILE": ring})
    assert (config.rank, config.size, config.source) == (1, 2, "MLX_RANK, MLX_HOSTFILE")


def test_torchruns_agent_keeps_its_port() -> None:
    config = resolve(AGENT)
    assert (config.rank, config.size, config.source) == (1, 4, "torchrun")
    assert config.store == ("10.0.0.3", 29500) and config.coordinator is None


def test_torchruns_variables_by_hand_name_a_free_port() -> None:
    config = resolve(TORCHRUN)
    assert config.coordinator == ("10.0.0.3", 29500) and config.store is None
    assert config.source == "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"


@pytest.mark.parametrize(
    ("environ", "rank", "size"),
    [({**OPEN_MPI, **MPICH, **SLURM}, 2, 5), ({**MPICH, **SLURM}, 3, 6), (SLURM, 4, 7)],
    ids=["ompi", "mpich", "slurm"],
)
def test_mpi_and_slurm_number_ranks_where_a_place_is_given(environ: dict[str, str], rank: int, size: int) -> None:
    config = resolve({"RT_COORDINATOR": "a:1", **environ})
    assert (config.rank, config.size, config.coordinator) == (rank, size, ("a", 1))


def test_a_world_of_one(tmp_path: Path) -> None:
    assert resolve({"RT_RANK": "0", "RT_WORLD_SIZE": "1", "RT_COORDINATOR": "127.0.0.1:1"}).size == 1
    alone = resolve({"RT_RANK": "0", "RT_HOSTFILE": write(tmp_path, [["[::1]:5000"]])})
    assert (alone.size, alone.addresses) == (1, ((("::1", 5000),),))


def test_each_set_gives_way_to_the_one_before(ring: str) -> None:
    mlx = {"MLX_RANK": "1", "MLX_HOSTFILE": ring}
    everything = {**RT, **mlx, **AGENT, **OPEN_MPI}
    found = [resolve(everything, rank=1, world_size=9, coordinator="a:1").source]
    for names in (RT, mlx, AGENT):
        found.append(resolve(everything).source)
        everything = {name: value for name, value in everything.items() if name not in names}
    assert found == ["keywords", "RT_RANK, RT_WORLD_SIZE, RT_COORDINATOR", "MLX_RANK, MLX_HOSTFILE", "torchrun"]
    assert resolve_ring(environ=everything) is None


def test_a_keyword_takes_the_place_of_its_variable(ring: str) -> None:
    config = resolve(RT, world_size=8)
    assert (config.rank, config.size, config.source) == (1, 8, "RT_RANK, keyword world_size, RT_COORDINATOR")
    assert resolve({"RT_RANK": "1", "RT_COORDINATOR": "a:1"}, hostfile=ring).addresses is not None
    assert resolve({"RT_HOSTFILE": ring, **{name: RT[name] for name in ("RT_RANK", "RT_WORLD_SIZE")}}, coordinator="a:1").size == 4


@pytest.mark.parametrize(
    ("keyword", "value", "variable", "text", "attribute", "from_keyword", "from_variable"),
    [
        ("connections_per_ip", 3, "RT_CONNECTIONS_PER_IP", "2", "connections", 3, 2),
        ("connect_timeout", 7, "RT_CONNECT_TIMEOUT", "2.5", "connect_timeout", 7.0, 2.5),
        ("timeout", 7.5, "RT_TIMEOUT", "1e3", "timeout", 7.5, 1000.0),
        ("shm", True, "RT_SHM", "0", "shm", True, False),
    ],
)
def test_settings(keyword: str, value: float, variable: str, text: str, attribute: str, from_keyword: float, from_variable: float) -> None:
    assert getattr(resolve({**RT, variable: text}), attribute) == from_variable
    assert getattr(resolve({**RT, variable: text}, **{keyword: value}), attribute) == from_keyword


def test_polling() -> None:
    assert resolve(RT).spin is None
    assert [resolve({**RT, "RT_SPIN_US": text}).spin for text in ("0", "50")] == [0.0, 50e-6]


def test_settings_hold_for_every_set(ring: str) -> None:
    for environ in ({"MLX_RANK": "1", "MLX_HOSTFILE": ring}, AGENT):
        config = resolve({**environ, "RT_TIMEOUT": "3", "RT_CONNECTIONS_PER_IP": "5"})
        assert config.timeout == 3.0 and config.connections == (2 if config.addresses else 5)


def test_sets_that_disagree_on_the_rank_are_an_error_naming_both(ring: str) -> None:
    mlx = {"MLX_RANK": "0", "MLX_HOSTFILE": ring}
    cases: list[tuple[dict[str, str], dict[str, Any], str, str]] = [
        ({**RT, **mlx}, {}, "RT_RANK", "MLX_RANK"),
        ({**RT, "MLX_RANK": "0"}, {}, "RT_RANK", "MLX_RANK"),
        ({**mlx, **AGENT}, {}, "MLX_RANK", "RANK"),
        ({**RT, **TORCHRUN, "RANK": "0"}, {}, "RT_RANK", "RANK"),
        (RT, {"rank": 0}, "keyword rank", "RT_RANK"),
    ]
    for environ, keywords, first, second in cases:
        one, other = (0, 1) if first in ("MLX_RANK", "keyword rank") else (1, 0)
        assert failure(environ, **keywords) == f"{first} and {second}: found ranks {one} and {other}, expected the same (or unset one)"


def test_what_does_not_number_our_ranks_may_differ() -> None:
    assert resolve({**RT, "RANK": "0"}).rank == 1  # no torchrun: a lone RANK belongs to anybody
    assert resolve({**RT, **SLURM, **OPEN_MPI}).rank == 1  # our launcher inside an allocation


def test_two_places_to_meet_are_an_error(ring: str) -> None:
    assert failure({**RT, "RT_HOSTFILE": ring}).startswith("RT_COORDINATOR and RT_HOSTFILE: found both, expected one")
    assert failure({}, rank=0, coordinator="a:1", hostfile=ring).startswith("keyword coordinator and keyword hostfile: found both")


def test_a_size_that_is_not_the_files(ring: str) -> None:
    text = failure({"RT_RANK": "1", "RT_HOSTFILE": ring, "RT_WORLD_SIZE": "3"})
    assert text == f"RT_WORLD_SIZE: found '3', expected 2, the number of ranks in RT_HOSTFILE {ring}"
    assert resolve({"RT_RANK": "1", "RT_HOSTFILE": ring, "RT_WORLD_SIZE": "2"}).size == 2


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ({"RT_RANK": "0"}, "no RT_HOSTFILE or RT_COORDINATOR"),
        ({"RT_WORLD_SIZE": "2"}, "no RT_RANK, no RT_HOSTFILE or RT_COORDINATOR"),
        ({"RT_HOSTFILE": "f"}, "no RT_RANK"),
        ({"RT_COORDINATOR": "a:1"}, "no RT_RANK, no RT_WORLD_SIZE"),
        ({"RT_RANK": "0", "RT_COORDINATOR": "a:1"}, "no RT_WORLD_SIZE"),
        ({"RT_RANK": "0", "RT_WORLD_SIZE": "2"}, "no RT_HOSTFILE or RT_COORDINATOR"),
        ({"RT_WORLD_SIZE": "2", "RT_COORDINATOR": "a:1"}, "no RT_RANK"),
        ({"MLX_RANK": "0"}, "no MLX_HOSTFILE"),
        ({"MLX_HOSTFILE": "f"}, "no MLX_RANK"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "no WORLD_SIZE, no MASTER_ADDR, no MASTER_PORT"),
    ],
)
def test_begun_but_incomplete(present: dict[str, str], missing: str) -> None:
    text = failure(present)
    assert f": found {missing} beside it, expected " in text
    assert text.startswith(("TORCHELASTIC_RUN_ID:", ", ".join(present) + ":"))


def test_a_begun_set_is_not_skipped_for_a_complete_one(ring: str) -> None:
    assert failure({"RT_RANK": "1", "MLX_RANK": "1", "MLX_HOSTFILE": ring}).startswith("RT_RANK: found no")
    assert failure({}, rank=1).startswith("keyword rank: found no RT_HOSTFILE or RT_COORDINATOR")


def test_mpi_without_its_size_is_incomplete() -> None:
    text = failure({"OMPI_COMM_WORLD_RANK": "0", "RT_COORDINATOR": "a:1"})
    assert text.startswith("OMPI_COMM_WORLD_RANK, RT_COORDINATOR: found no RT_WORLD_SIZE")


@pytest.mark.parametrize("value", ["", "x", "-1", "4", "1.0", " 1", "1_0", "+1", "١", "9" * 30])
def test_ranks_that_are_none(value: str) -> None:
    assert failure({**RT, "RT_RANK": value}) == f"RT_RANK: found {value!r}, expected an integer from 0 to 3 (there are 4 ranks)"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({**RT, "RT_WORLD_SIZE": "0"}, "RT_WORLD_SIZE: found '0', expected an integer >= 1"),
        ({**RT, "RT_WORLD_SIZE": "two"}, "RT_WORLD_SIZE: found 'two', expected an integer >= 1"),
        ({**RT, "RT_CONNECTIONS_PER_IP": "0"}, "RT_CONNECTIONS_PER_IP: found '0', expected an integer >= 1"),
        ({**RT, "RT_CONNECT_TIMEOUT": "soon"}, "RT_CONNECT_TIMEOUT: found 'soon', expected a number of seconds > 0"),
        ({**RT, "RT_CONNECT_TIMEOUT": "0"}, "RT_CONNECT_TIMEOUT: found '0', expected a number of seconds > 0"),
        ({**RT, "RT_TIMEOUT": "-1"}, "RT_TIMEOUT: found '-1', expected a number of seconds > 0"),
        ({**RT, "RT_TIMEOUT": "nan"}, "RT_TIMEOUT: found 'nan', expected a number of seconds > 0"),
        ({**RT, "RT_TIMEOUT": "inf"}, "RT_TIMEOUT: found 'inf', expected a number of seconds > 0"),
        ({**RT, "RT_SPIN_US": "-1"}, "RT_SPIN_US: found '-1', expected a number of microseconds >= 0"),
        ({**RT, "RT_SPIN_US": "1.5"}, "RT_SPIN_US: found '1.5', expected a number of microseconds >= 0"),
        ({**RT, "RT_SHM": "yes"}, "RT_SHM: found 'yes', expected 1 or 0"),
        ({**RT, "MLX_RANK": "one"}, "MLX_RANK: found 'one', expected an integer >= 0"),
        ({**AGENT, "RANK": "4"}, "RANK: found '4', expected an integer from 0 to 3 (there are 4 ranks)"),
        ({**AGENT, "WORLD_SIZE": ""}, "WORLD_SIZE: found '', expected an integer >= 1"),
        ({**AGENT, "MASTER_PORT": "http"}, "MASTER_PORT: found port 'http', expected 1 to 65535"),
        ({**AGENT, "MASTER_ADDR": ""}, "MASTER_ADDR: found host '', expected an IP address or a host name"),
    ],
)
def test_malformed_variables(environ: dict[str, str], expected: str) -> None:
    assert failure(environ) == expected


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"rank": True}, "keyword rank: found True, expected an integer from 0 to 3 (there are 4 ranks)"),
        ({"rank": 1.0}, "keyword rank: found 1.0, expected an integer from 0 to 3 (there are 4 ranks)"),
        ({"world_size": 0}, "keyword world_size: found 0, expected an integer >= 1"),
        ({"connections_per_ip": 0}, "keyword connections_per_ip: found 0, expected an integer >= 1"),
        ({"connect_timeout": 0}, "keyword connect_timeout: found 0, expected a number of seconds > 0"),
        ({"timeout": True}, "keyword timeout: found True, expected a number of seconds > 0"),
        ({"shm": 1}, "keyword shm: found 1, expected True or False"),
        ({"shm": "0"}, "keyword shm: found '0', expected True or False"),
        ({"coordinator": 4000}, 'keyword coordinator: found 4000, expected "host:port", or "[v6]:port" for IPv6'),
    ],
)
def test_malformed_keywords(keywords: dict[str, Any], expected: str) -> None:
    assert failure(RT, **keywords) == expected


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("Node-7.Example.org:65535", ("node-7.example.org", 65535)),
        ("[::1]:4000", ("::1", 4000)),
        ("[2001:DB8:0:0::0001]:4000", ("2001:db8::1", 4000)),
        ("[fe80::1%eth0]:4000", ("fe80::1%eth0", 4000)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert resolve({**RT, "RT_COORDINATOR": text}).coordinator == address


@pytest.mark.parametrize("text", ["", "host", "::1:4000", "[::1]", "[::1", "a:b:1"])
def test_what_is_no_address(text: str) -> None:
    assert failure({**RT, "RT_COORDINATOR": text}) == f'RT_COORDINATOR: found {text!r}, expected "host:port", or "[v6]:port" for IPv6'


@pytest.mark.parametrize("port", ["0", "65536", "", "-1", "x", "1 ", "١"])
def test_what_is_no_port(port: str) -> None:
    assert failure({**RT, "RT_COORDINATOR": f"host:{port}"}) == f"RT_COORDINATOR: found port {port!r}, expected 1 to 65535"


@pytest.mark.parametrize("host", ["", "10.0.0.256", "10.0.1", "[::g]", "[10.0.0.1]", "user@host", "a b", "-a", "http//x"])
def test_what_is_no_host(host: str) -> None:
    assert failure({**RT, "RT_COORDINATOR": f"{host}:1"}).startswith(f"RT_COORDINATOR: found host {host!r}, expected a")


def test_torchruns_ipv6_master_with_and_without_brackets() -> None:
    for text in ("::1", "[::1]"):
        assert resolve({**AGENT, "MASTER_ADDR": text}).store == ("::1", 29500)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "found an empty file, expected a JSON list"),
        ("[[]\n, 'a']", "found no JSON at line 2 column 3 (Expecting value), expected a JSON list"),
        ("[]", "found [], expected a JSON list"),
        ("3", "found 3, expected a JSON list"),
        ({"rank0": "a:1"}, 'found {"rank0": "a:1"}, expected a JSON list'),
        ([[]], 'entry [0]: found [], expected a list of "ip:port"'),
        ([["a:1"], "b:1"], 'entry [1]: found "b:1", expected a list of "ip:port"'),
        ([["a:1"], [7]], "entry [1][0]: found 7, expected"),
        ([["a:1", "b"]], "entry [0][1]: found 'b', expected \"host:port\""),
        ([["a:1"], ["a:65536"]], "entry [1][0]: found port '65536', expected 1 to 65535"),
        ([["::1:1"]], "entry [0][0]: found '::1:1', expected"),
        ([["a:1"], ["b:1", "b:2"]], "entry [1]: found 2 addresses, expected 1, as many as rank 0 has"),
        ([["a:1"], ["b:1"], ["A:1"]], "entry [2][0]: found a port 1 again, expected it only at [0][0]"),
        ([["[::1]:1", "[0:0::1]:1"]], "entry [0][1]: found ::1 port 1 again, expected it only at [0][0]"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}], "found a launcher's hostfile (hosts to ssh to), expected a JSON list"),
        ({"backend": "ring", "hosts": []}, "found a launcher's hostfile (hosts to ssh to), expected a JSON list"),
    ],
)
@pytest.mark.parametrize("name", ["RT", "MLX"])
def test_malformed_ring_files(content: object, expected: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    assert failure({f"{name}_RANK": "0", f"{name}_HOSTFILE": path}).startswith(f"{name}_HOSTFILE {path}: {expected}")


def test_unreadable_ring_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b'[["a:1\xff"]]')
    for path, found in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), (tmp_path / "binary", "no UTF-8 at offset 6")):
        text = failure({"RT_RANK": "0"}, hostfile=path)
        assert text.startswith(f"keyword hostfile {path}: found") and found in text


def test_a_long_mistake_is_cut_short(tmp_path: Path) -> None:
    assert len(failure({"RT_RANK": "0", "RT_HOSTFILE": write(tmp_path, {str(n): n for n in range(999)})})) < 300 + len(str(tmp_path))


def test_a_rank_beyond_the_ring(ring: str) -> None:
    for name in ("RT", "MLX"):
        text = failure({f"{name}_RANK": "2", f"{name}_HOSTFILE": ring})
        assert text == f"{name}_RANK: found '2', expected an integer from 0 to 1 (there are 2 ranks)"


def test_all_ranks_of_a_job_and_no_others_share_its_name(ring: str) -> None:
    jobs = [resolve({**RT, "RT_RANK": str(rank)}).job for rank in range(4)]
    assert len(set(jobs)) == 1 and len(jobs[0]) == 32
    others = [
        resolve({**RT, "RT_WORLD_SIZE": "5"}),
        resolve({**RT, "RT_COORDINATOR": "10.0.0.1:4001"}),
        resolve({**RT, "RT_JOB_ID": "second"}),
        resolve({"RT_RANK": "1", "RT_HOSTFILE": ring}),
        resolve(AGENT),
        resolve({**AGENT, "TORCHELASTIC_RUN_ID": "second"}),
        resolve({**AGENT, "RT_JOB_ID": "third"}),
    ]
    assert len({jobs[0], *(config.job for config in others)}) == 8


def test_one_address_in_two_spellings_is_one_job() -> None:
    assert resolve({**RT, "RT_COORDINATOR": "[::0001]:1"}).job == resolve({**RT, "RT_COORDINATOR": "[::1]:1"}).job
    assert resolve({**RT, "RT_COORDINATOR": "HOST:1"}).job == resolve({**RT, "RT_COORDINATOR": "host:1"}).job


def test_a_job_across_hosts_needs_a_secret(tmp_path: Path) -> None:
    ring = write(tmp_path, [["127.0.0.1:1"], ["192.0.2.7:1"]])
    for environ in ({"RT_RANK": "0", "RT_HOSTFILE": ring}, {**RT, "RT_COORDINATOR": "192.0.2.7:1"}, {**AGENT, "MASTER_ADDR": "192.0.2.7"}):
        with pytest.raises(ConfigError, match=r"192\.0\.2\.7 is another"):
            resolve_ring(environ=environ)
        config = resolve_ring(environ={**environ, "RT_INSECURE": "1"})
        assert config is not None and config.secret.key is None


def test_on_one_host_the_user_has_one(tmp_path: Path) -> None:
    config = resolve_ring(environ={**RT, "RT_COORDINATOR": "127.0.0.1:1", "HOME": str(tmp_path)})
    assert config is not None and config.secret.source == str(tmp_path / ".cache/rt/secret")


def test_the_configuration_does_not_show_the_secret() -> None:
    config = resolve(RT, secret="hunter2 hunter2 hunter2")
    assert config.secret.key == b"hunter2 hunter2 hunter2"
    assert "hunter2" not in f"{config!r} {config} {config!s}"


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.socket() as server:
        yield str(server.fileno())


def test_rank_0_inherits_the_coordinators_socket(listening: str) -> None:
    environ = {**RT, "RT_RANK": "0", "RT_COORDINATOR_FD": listening}
    assert resolve(environ).coordinator_fd == int(listening)
    assert resolve({**environ, "RT_RANK": "1"}).coordinator_fd is None
    assert resolve(environ, coordinator="elsewhere:1").coordinator_fd is None


def test_what_is_no_inherited_socket(listening: str, tmp_path: Path) -> None:
    environ = {**RT, "RT_RANK": "0"}
    with (tmp_path / "file").open("w") as file:
        for fd in (file.fileno(), 987654):
            assert failure({**environ, "RT_COORDINATOR_FD": str(fd)}).startswith(
                f"RT_COORDINATOR_FD: found {fd}, which is no open socket, expected"
            )
    assert failure({**environ, "RT_COORDINATOR_FD": "x"}) == "RT_COORDINATOR_FD: found 'x', expected an integer >= 0"


NCCL = {"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_RANK": "0", "MLX_WORLD_SIZE": "2"}


@pytest.fixture
def without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "missing", lambda: "which needs something")


def test_which_backends_are_there() -> None:
    assert [name for name in ("any", "jaccl", "ring", "gloo", "") if is_available(name)] == ["any", "ring"]


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        choose_backend("gloo", {}, False)
    expected = "[distributed] The only valid values for backend are 'any', 'mpi', 'nccl', 'jaccl' and 'ring' but 'gloo' was provided."
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("backend", "environ", "chosen"),
    [
        ("any", {}, "ring"),
        ("ring", {}, "ring"),
        ("any", {"RT_BACKEND": "ring"}, "ring"),
        ("any", {"RT_BACKEND": "any"}, "ring"),
        ("ring", {"RT_BACKEND": "nonsense"}, "ring"),
        ("nccl", {}, None),
        ("any", NCCL, "ring"),
    ],
)
def test_choice(backend: str, environ: dict[str, str], chosen: str | None, without_nccl: None) -> None:
    assert choose_backend(backend, environ, False) == chosen


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [(NCCL, "nccl"), ({}, "ring"), (NCCL | {"RT_BACKEND": "ring"}, "ring"), (NCCL | RT, "ring"), ({"RT_BACKEND": "nccl"}, "nccl")],
)
def test_choice_with_nccl(environ: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "missing", lambda: "")
    assert choose_backend("any", environ, False) == chosen


def test_backends_that_are_not_there(without_nccl: None) -> None:
    with pytest.raises(ConfigError, match=r"^keyword backend: found 'nccl', which needs something$"):
        choose_backend("nccl", {}, True)
    for strict in (False, True):  # the launcher's word must not end in N singletons
        with pytest.raises(ConfigError, match=r"^RT_BACKEND: found 'nccl', which needs something$"):
            choose_backend("any", {"RT_BACKEND": "nccl"}, strict)
    with pytest.raises(ConfigError, match=r"^RT_BACKEND: found 'gloo', expected one of any, mpi, nccl, jaccl, ring$"):
        choose_backend("any", {"RT_BACKEND": "gloo"}, False)


def test_strict_that_is_a_backend() -> None:
    with pytest.raises(TypeError, match="did you mean backend='mpi'"):
        choose_backend("any", {}, "mpi")  # type: ignore[arg-type]


def test_the_default_is_the_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("RT_", "MLX_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in {**RT, **SECRET}.items():
        monkeypatch.setenv(name, value)
    config = resolve_ring()
    assert config is not None and config.rank == 1
