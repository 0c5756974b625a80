"""Checkpoints of RecBole are read, whatever protocol and objects they were written with, and nothing in them is run."""

import io
import os
import pickle
import pickletools
import random
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from authors_cases import AuthorsModel, scores_agree
from checkpoint_cases import error_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blossomrec_hf.sharing.conversion import from_authors
from blossomrec_hf.sharing.recbole import read_checkpoint


REAL = Path(os.environ.get("BLOSSOMREC_TEST_DATA", "nowhere")).parent / "cases" / "recbole" / "recbole_protocol4.pth"


@pytest.fixture
def authors():
    return AuthorsModel(30, 16, 4).double().eval()


@pytest.fixture
def recbole(monkeypatch):
    """Classes that can be pickled while the test writes its file, as in RecBole's environment."""
    module = types.ModuleType("recbole_of_the_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("Config", "EnumMember"):
        kind = type(name, (), {"__module__": module.__name__, "__qualname__": name})
        setattr(module, name, kind)
    return module


def write(path, content, protocol=2):
    torch.save(content, path, pickle_protocol=protocol)
    return path


def replace_pickle(path, program: bytes):
    """Puts another pickle into a file of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else data)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_and_settings_with_every_protocol(authors, recbole, tmp_path, protocol):
    config = recbole.Config()
    config.final_config_dict = {
        "n_heads": 4, "hidden_act": "gelu", "layer_norm_eps": np.float64(1e-8), "epochs": 3,
        "device": torch.device("cpu"), "enum": recbole.EnumMember(), "learned": np.float32(0.5),
    }  # fmt: skip
    optimizer = torch.optim.Adam(authors.parameters()).state_dict()
    checkpoint = {"config": config, "epoch": 2, "best_valid_score": np.float64(0.25), "cur_step": np.int64(3),
                  "state_dict": authors.state_dict(), "other_parameter": None, "optimizer": optimizer}  # fmt: skip
    path = write(tmp_path / "theirs.pth", checkpoint, protocol)
    for name in list(vars(recbole)):
        if name in ("Config", "EnumMember"):
            delattr(recbole, name)  # where the file is read, there is no RecBole
    state, found = read_checkpoint(path)
    assert found == {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-8}
    assert state.keys() == authors.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in authors.state_dict().items())
    scores_agree(authors, from_authors(state, **{**found, "layer_norm_eps": 1e-12}))


def test_a_state_dict_alone_and_tensors_of_every_kind(tmp_path):
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)  # fmt: skip
    state = {str(kind): torch.randint(0, 2, (3, 4)).to(kind) for kind in kinds}
    shared = torch.randn(5, 6)
    state |= {"view": shared[1:4:2].T, "again": shared, "empty": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    read, found = read_checkpoint(write(tmp_path / "state.pth", state, random.choice([2, 4])))
    assert found == {} and read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value.detach())


@pytest.mark.skipif(not REAL.is_file(), reason="needs a checkpoint that RecBole wrote")
def test_a_checkpoint_that_recbole_wrote():
    state, found = read_checkpoint(REAL)
    assert found["num_attention_heads"] == 4 and found["hidden_act"] == "gelu"
    items, width = state["item_embedding.weight"].shape
    theirs = AuthorsModel(items - 1, width, 4, inner=128).double().eval()
    theirs.load_state_dict({name: value.double() for name, value in state.items()})
    ours = from_authors({name: value.double() for name, value in state.items()}, **found)
    scores_agree(theirs, ours, items=items - 1)


class Hostile:
    """Makes a file when it is called, in every way that a pickle has."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def hostile_objects(marker: Path) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "os.system": Hostile((os.system, (command,))),
        "eval": Hostile((eval, (f"open({str(marker)!r}, 'w')",))),
        "open": Hostile((open, (str(marker), "w"))),
        "path": Hostile((Path.touch, (marker,))),
        "torch.load": Hostile((torch.load, (str(marker),))),
        "setattr": Hostile((setattr, (torch.nn.Module, "was_run", 1))),
        "partial": Hostile((types.SimpleNamespace, (), {"x": Hostile((os.system, (command,)))})),
        "list": Hostile((list, (), None, iter([Hostile((os.system, (command,)))]))),
        "dict": Hostile((dict, (), None, None, iter([("x", Hostile((os.system, (command,))))]))),
    }


@pytest.mark.parametrize("name", sorted(hostile_objects(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(authors, tmp_path, name, protocol):
    marker = tmp_path / "marker"
    hostile = hostile_objects(marker)[name]
    for place in ("config", "optimizer", "state_dict"):
        checkpoint = {"state_dict": authors.state_dict(), place: hostile}
        path = write(tmp_path / "hostile.pth", checkpoint, protocol)
        if place == "state_dict":
            assert "no weights" in error_message(lambda path=path: read_checkpoint(path), ValueError)
        else:
            assert len(read_checkpoint(path)[0]) == len(authors.state_dict())
    assert not marker.exists() and not hasattr(torch.nn.Module, "was_run")


def test_hand_written_pickles_run_nothing_either(authors, tmp_path):
    """Ways to call that `pickle.dumps` never writes: INST, OBJ, a call of a result, a state for a class."""
    marker = tmp_path / "marker"
    command = b"touch " + str(marker).encode()
    programs = [
        b"(S'" + command + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + command + b"'\no.",  # OBJ
        b"cos\nsystem\n(S'" + command + b"'\ntR.",  # GLOBAL, REDUCE
        b"\x80\x02cbuiltins\ngetattr\n(cos\nO\nS'system'\ntR(S'" + command + b"'\ntR.",  # a call of a result
        b"\x80\x02cos\nsystem\n(S'" + command + b"'\nt\x81.",  # NEWOBJ
        b"\x80\x02cos\nsystem\n}S'__call__'\nS'x'\nsb.",  # BUILD on a class
        b"\x80\x02(S'" + command + b"'\nlQ.",  # BINPERSID
        b"P" + command + b"\n.",  # PERSID
    ]
    path = write(tmp_path / "theirs.pth", authors.state_dict())
    for program in programs:
        pickletools.dis(program, io.StringIO())  # well-formed
        assert "theirs.pth" in error_message(
            lambda program=program: read_checkpoint(replace_pickle(path, program)), ValueError
        )
    assert not marker.exists()


def test_tensors_that_do_not_fit_into_their_values_are_refused(tmp_path):
    path = write(tmp_path / "state.pth", {"a": torch.arange(6.0).reshape(2, 3)})
    program = zipfile.ZipFile(path).read("state/data.pkl")
    (size,) = [position for op, arg, position in pickletools.genops(program) if arg == 3 and op.name == "BININT1"][:1]
    for huge in (struct.pack("<i", 2**31 - 1), struct.pack("<i", -1), struct.pack("<i", 7)):
        other = program[:size] + b"J" + huge + program[size + 2 :]
        assert "damaged" in error_message(lambda other=other: read_checkpoint(replace_pickle(path, other)), ValueError)
    # A small file with many tensors of the same values.
    shared = torch.zeros(1000)
    path = write(tmp_path / "many.pth", {str(number): shared for number in range(1000)})
    assert "many times larger" in error_message(lambda: read_checkpoint(path), ValueError)


def test_other_files_are_refused_in_a_sentence(tmp_path):
    other = tmp_path / "other.pth"
    for content in (b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"x" * 1000):
        other.write_bytes(content)
        message = error_message(lambda: read_checkpoint(other), ValueError)
        assert "other.pth" in message and "torch.save" in message
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other/data.pkl", bytes(10**7))
    assert "not stored as it is" in error_message(lambda: read_checkpoint(other), ValueError)
    for content in ({"epoch": 1}, [1, 2], AuthorsModel(5, 8, 2).item_embedding, None, {"state_dict": 3}):
        assert "no weights" in error_message(
            lambda content=content: read_checkpoint(write(other, content)), ValueError
        )
    with pytest.raises(OSError):
        read_checkpoint(tmp_path / "nowhere.pth")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_bytes_change_it_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write(folder / "state.pth", {"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "config": 1}, 4)
    program = bytearray(zipfile.ZipFile(path).read("state/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(program) - 1))
        program[place] = data.draw(st.integers(0, 255))
    try:
        state, _ = read_checkpoint(replace_pickle(path, bytes(program)))
    except ValueError as error:
        assert "state.pth" in str(error)
    else:
        assert all(isinstance(value, torch.Tensor) for value in state.values())
