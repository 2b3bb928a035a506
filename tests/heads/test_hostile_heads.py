"""A head is data from anyone: a hostile one is refused by name; no code runs, nothing outside its folder is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mara_integrations.errors import HeadError
from mara_integrations.heads.cache import HeadCache
from mara_integrations.heads.folder import sha256
from mara_integrations.heads.head import MARAHead
from mara_integrations.testing import random_head

WIDTH = 8
SHA = "0" * 64
KEY = "the private key\n"


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


# --- what is wrong with a head: functions of its folder, which holds a good one -------------------------------------


def config(**changes):
    """Other values in the config."""

    def damage(folder):
        path = folder / "head_config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return damage


def config_text(text):
    def damage(folder):
        (folder / "head_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def raw_value(name, text):
    """A value that `json.dumps` would not write."""

    def damage(folder):
        path = folder / "head_config.json"
        values = json.loads(path.read_text())
        values[name] = "@@"
        path.write_text(json.dumps(values).replace('"@@"', text))

    return damage


def weights(change, **metadata):
    """Other tensors, under their true hash."""

    def damage(folder):
        tensors = {name: tensor.clone() for name, tensor in MARAHead.from_pretrained(folder).state_dict().items()}
        data = save(change(tensors) or tensors, metadata or None)
        write_weights(folder, data)

    return damage


def write_weights(folder, data):
    (folder / "head.safetensors").write_bytes(data)
    config(weights_sha256=sha256(data))(folder)


def weight_bytes(change):
    """Other bytes in the place of the weights, under their true hash."""
    return lambda folder: write_weights(folder, change((folder / "head.safetensors").read_bytes()))


def header(change):
    """Another header before the same numbers."""

    def changed(data):
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(change(json.loads(data[8 : 8 + length])))
        return struct.pack("<Q", len(text)) + text.encode() + data[8 + length :]

    return weight_bytes(changed)


def in_turn(*damages):
    """Several damages, one after the other."""

    def damage(folder):
        for one in damages:
            one(folder)

    return damage


def linked(name, target):
    """A link in the place of a file."""

    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def sparse(size):
    def make(path):
        with path.open("wb") as file:
            file.truncate(size)

    return make


def folder_is(make):
    def damage(folder):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        make(folder)

    return damage


def set_to(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


def cast(dtype, name="linear1.weight"):
    return lambda tensors: {**tensors, name: tensors[name].to(dtype)}


def reward(**changes):
    """A reward model beside the head, described otherwise."""
    spec = {"kind": "reward_model", "name": "x", "file": "rewards/x.safetensors", "sha256": SHA, **changes}
    return config(rewards=[{name: value for name, value in spec.items() if value is not ...}])


def deep(depth):
    return "[" * depth + "]" * depth


def ms(shape, dtype="F32", offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


FOLDERS = {
    # sizes that would take memory
    "inner sizes of a million": config(inner_sizes=[10**6, 10**6]),
    "inner sizes of 2**40": config(inner_sizes=[2**40, 4]),
    "inner size 0": config(inner_sizes=[0, 4]),
    "inner size -1": config(inner_sizes=[-1, 4]),
    "one inner size": config(inner_sizes=[6]),
    "three inner sizes": config(inner_sizes=[6, 4, 2]),
    "hidden size 10**12": config(hidden_size=10**12),
    "hidden size 10**30": config(hidden_size=10**30),
    "hidden size 0": config(hidden_size=0),
    "hidden size -8": config(hidden_size=-8),
    "hidden size 1.5": config(hidden_size=1.5),
    "hidden size text": config(hidden_size="many"),
    "hidden size null": config(hidden_size=None),
    "hidden size left out": config(hidden_size=...),
    "another hidden size": config(hidden_size=9),
    "10 GB of weights": replaced("head.safetensors", sparse(10**10)),
    "10 GB of config": replaced("head_config.json", sparse(10**10)),
    "a header of 10**18 bytes": weight_bytes(lambda data: struct.pack("<Q", 10**18) + data[8:]),
    "a header of 80 MB": weight_bytes(lambda data: struct.pack("<Q", 80_000_000) + data[8:]),
    "a tensor of 2**60 numbers": header(lambda h: {**h, "ln.weight": ms([2**60])}),
    "a tensor with overflowing shape": header(lambda h: {**h, "ln.weight": ms([2**40, 2**40])}),
    # numbers
    "scale NaN": raw_value("scale", "NaN"),
    "scale Infinity": raw_value("scale", "Infinity"),
    "scale 1e308": config(scale=1e308),
    "scale 1e400": raw_value("scale", "1e400"),
    "scale 0": config(scale=0),
    "scale -1": config(scale=-1),
    "scale text": config(scale="strong"),
    "top_p 2": config(top_p=2),
    "top_p NaN": raw_value("top_p", "NaN"),
    "top_k 0": config(top_k=0),
    "top_k 2**63": config(top_k=2**63),
    "min_candidates 2**63": config(min_candidates=2**63),
    "a figure NaN": raw_value("metrics", '{"a": [NaN]}'),
    "a figure Infinity": raw_value("training", '{"a": {"b": -Infinity}}'),
    "weights NaN": weights(set_to("linear1.weight", float("nan"))),
    "weights inf": weights(set_to("output_linear.bias", float("-inf"))),
    "weights beyond float32": weights(lambda t: {**t, "ln.bias": t["ln.bias"].double() + 1e300}),
    "complex weights": in_turn(  # old releases of safetensors write none
        weights(cast(torch.float64)),
        header(lambda h: {**h, "linear1.weight": {**h["linear1.weight"], "dtype": "C64"}}),
    ),
    "bool weights": weights(cast(torch.bool)),
    "int8 weights": weights(cast(torch.int8)),
    "int64 weights": weights(cast(torch.int64)),
    "float8 weights": weights(cast(torch.float8_e4m3fn)),
    "an unknown number format": header(lambda h: {**h, "ln.weight": {**h["ln.weight"], "dtype": "F99"}}),
    # shapes and files
    "a tensor more": weights(lambda t: {**t, "more": torch.zeros(2)}),
    "a tensor less": weights(lambda t: {name: t[name] for name in list(t)[1:]}),
    "no tensors": weights(lambda t: {"only": torch.zeros(0)}),
    "weights of another shape": weights(lambda t: {**t, "ln.bias": torch.zeros(WIDTH, 1)}),
    "weights of another head": lambda folder: (folder / "head.safetensors").write_bytes(b"other"),
    "empty weights": weight_bytes(lambda data: b""),
    "weights cut short": weight_bytes(lambda data: data[:-5]),
    "weights too long": weight_bytes(lambda data: data + b"\0" * 8),
    "a header that is not JSON": weight_bytes(lambda data: struct.pack("<Q", 4) + b"{{{{" + data[12:]),
    "overlapping tensors": header(lambda h: {**h, "ln.weight": h["ln.bias"]}),
    "a negative offset": header(lambda h: {**h, "ln.weight": ms([WIDTH], offsets=(-4, 28))}),
    "pickled weights": weight_bytes(lambda data: pickle.dumps(Evil())),
    "another hash": config(weights_sha256=SHA),
    "a hash that is a path": config(weights_sha256="../../secret"),
    # configs
    "an empty config": config_text(""),
    "a config that is a list": config_text("[]"),
    "a config that is a number": config_text("1"),
    "a broken config": config_text("{"),
    "a config in latin-1": config_text('{"form": "ä"}'.encode("latin-1")),
    "a lone surrogate": raw_value("method", '"\\ud800"'),
    "a config 100,000 deep": config_text('{"metrics": ' + deep(100_000) + "}"),
    "a number of 5,000 digits": raw_value("hidden_size", "9" * 5000),
    "an unknown key": config(auto_map={"AutoModel": "evil.py"}),
    "an unknown form": config(form="other"),
    "a format of the future": config(format_version=99),
    "a pickled config": lambda folder: (folder / "head_config.json").write_bytes(pickle.dumps(Evil())),
    "control characters in the model's name": config(base_model="a\x1b[2J\x07"),
    "control characters in the method": config(method="\x1b]0;title\x07"),
    "text that runs backwards": config(base_model="abc\u202egnp.exe"),
    "control characters in a key": config(**{"\x1b[2Jkey": 1}),
    "a name of 100,000 characters": config(base_model="x" * 100_000),
    # paths
    "a reward file above the folder": reward(file="../secret/id_rsa"),
    "an absolute reward file": reward(file="/etc/passwd"),
    "a reward file that climbs": reward(file="rewards/../../secret/id_rsa"),
    "a reward file in the folder itself": reward(file="head_config.json"),
    "a hidden reward file": reward(file="rewards/.x.safetensors"),
    "a reward file with a line break": reward(file="rewards/x\n.safetensors"),
    "a reward that is Python": reward(file="rewards/x.py"),
    "a reward file with a back slash": reward(file="rewards/..\\x.safetensors"),
    "a reward file without a hash": reward(sha256=...),
    "a reward file with a wrong hash": reward(sha256="zz"),
    "a reward with control characters": reward(name="\x1b[2J"),
    "a reward that is not a mapping": config(rewards=["function"]),
    "weights that are a link out": linked("head.safetensors", "../secret/id_rsa"),
    "a config that is a link out": linked("head_config.json", "../secret/head_config.json"),
    "a config that is an absolute link": linked("head_config.json", "/etc/passwd"),
    "weights without end": linked("head.safetensors", "/dev/zero"),
    "a dangling link": linked("head.safetensors", "nowhere"),
    "a link to itself": linked("head_config.json", "head_config.json"),
    "weights that are a folder": replaced("head.safetensors", Path.mkdir),
    "a config that is a folder": replaced("head_config.json", Path.mkdir),
    "weights that are a pipe": replaced("head.safetensors", os.mkfifo),
    "a config that is a pipe": replaced("head_config.json", os.mkfifo),
    "no weights": lambda folder: (folder / "head.safetensors").unlink(),
    "no config": lambda folder: (folder / "head_config.json").unlink(),
    "an empty folder": folder_is(Path.mkdir),
    "a folder that is a file": folder_is(lambda folder: folder.write_text("x")),
    "a folder that is a dangling link": folder_is(lambda folder: folder.symlink_to("nowhere")),
    "a folder that is a link to itself": folder_is(lambda folder: folder.symlink_to(folder)),
    "no folder": folder_is(lambda folder: None),
}


# --- published actors ----------------------------------------------------------------------------------------------


def actor(**changes):
    state = random_head(WIDTH, "paper", inner_sizes=(6, 4)).state_dict()
    return {**state, **changes}


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def quantised(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are deprecated
        return torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)


def rewritten(data, change, compression=zipfile.ZIP_STORED):
    """A checkpoint with other contents in its archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return file.getvalue()


CHECKPOINTS = {
    "code in a dict": lambda: saved({"ln.weight": Evil()}),
    "code alone": lambda: saved(Evil()),
    "code in the old format": lambda: saved({"ln.weight": Evil()}, _use_new_zipfile_serialization=False),
    "a plain pickle": lambda: pickle.dumps(Evil()),
    "an empty file": lambda: b"",
    "noise": lambda: b"PK\x03\x04" + b"x" * 100,
    "a whole module": lambda: saved(torch.nn.Linear(2, 2)),
    "a list": lambda: saved([torch.zeros(2)]),
    "a critic": lambda: saved({"fc.weight": torch.zeros(2, 2)}),
    "numbers in place of tensors": lambda: saved({**actor(), "ln.weight": 1.0}),
    "a meta tensor": lambda: saved(actor(**{"linear1.weight": torch.empty(10**6, 10**6, device="meta")})),
    "an expanded tensor": lambda: saved(actor(**{"linear1.weight": torch.zeros(1).expand(10**6, 10**6)})),
    "a sparse tensor": lambda: saved(actor(**{"ln.bias": torch.zeros(WIDTH).to_sparse()})),
    "a quantised tensor": lambda: saved(actor(**{"ln.bias": quantised(torch.zeros(WIDTH))})),
    "integers": lambda: saved(actor(**{"ln.bias": torch.zeros(WIDTH, dtype=torch.long)})),
    "NaN": lambda: saved(actor(**{"ln.bias": torch.full((WIDTH,), float("nan"))})),
    "a vector in place of a matrix": lambda: saved(actor(**{"linear1.weight": torch.zeros(6)})),
    "an empty matrix": lambda: saved(actor(**{"linear1.weight": torch.zeros(0, 0)})),
    "another width": lambda: saved(actor(**{"ln.bias": torch.zeros(WIDTH + 1)})),
    "a storage cut short": lambda: rewritten(saved(actor()), lambda n, d: d[:8] if "/data/" in n else d),
    "a zip bomb": lambda: rewritten(
        saved(actor()), lambda n, d: b"\0" * 10**7 if n.endswith("data/0") else d, zipfile.ZIP_DEFLATED
    ),
}


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of its own, beside a secret, in which the process works."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text(KEY)
    random_head(WIDTH, "residual", inner_sizes=(6, 4)).save_pretrained(tmp_path / "secret" / "head")
    (tmp_path / "secret" / "head_config.json").write_text((tmp_path / "secret/head/head_config.json").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Watch:
    """What the process does beside reading a head: an audit hook, which Python can't take away, so there is one."""

    is_on = False
    seen: list[str] = []  # noqa: RUF012  # of the class: the hook outlives a test

    @classmethod
    def hook(cls, event, arguments):
        if not cls.is_on or threading.current_thread() is not threading.main_thread():
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.fsdecode(arguments[0])
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if writes or "secret" in os.path.realpath(name) or name.startswith(("/etc", "/dev")):
                cls.seen.append(f"open {name}")
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.system", "subprocess.Popen", "socket.getaddrinfo"):
            cls.seen.append(f"{event} {arguments}")


sys.addaudithook(Watch.hook)


@pytest.fixture
def watch():
    Watch.seen, Watch.is_on = [], True
    yield Watch
    Watch.is_on = False


def refusal(source, name, watch):
    """The message of the error that a head is refused with; what else happens fails the test."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HeadError) as caught:
        MARAHead.from_pretrained(source)
    watch.is_on = False
    assert watch.seen == [] and not Path("pwned").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "less than 200 MB are taken"
    said = str(caught.value)
    assert name in said and len(said) < 2000 and KEY not in said
    assert not [character for character in said if not character.isprintable()], "no control characters"
    return said


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_folder_is_refused_by_name(place, kind, watch):
    watch.is_on = False
    folder = random_head(WIDTH, "residual", base_model="m", inner_sizes=(6, 4)).save_pretrained(place / "head-x")
    FOLDERS[kind](folder)
    watch.is_on = True

    refusal("./head-x", "head-x", watch)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_by_name(place, kind, watch):
    watch.is_on = False
    (place / "actor-x.pth").write_bytes(CHECKPOINTS[kind]())
    watch.is_on = True

    refusal("actor-x.pth", "actor-x.pth", watch)


@pytest.mark.parametrize(
    "name",
    ["", ".", "x\0y", "x" * 5000, "~nobody-here/x", "/dev/zero", "/dev/stdin", "nowhere.pth", "a b/c", "../../nowhere",
     "org/name/more", "-x/--y", "hf:", "hf:../secret", "hf:a b", "secret/nowhere", "\x1b[2J"],
)  # fmt: skip
def test_a_name_of_no_head_is_refused(place, name, watch):
    refusal(name, "", watch)


def test_a_good_head_beside_anything_else_is_read_alone(place, watch):
    """Files that other libraries would run are not even opened."""
    watch.is_on = False
    folder = random_head(WIDTH, "residual", inner_sizes=(6, 4)).save_pretrained(place / "head-x")
    (folder / "rewards").symlink_to("../secret")
    for name in ("head.py", "modeling.py", "setup.py", "__init__.py", "conftest.py"):
        (folder / name).write_text("import os; os.mkdir('pwned')")
    (folder / "adapter.pkl").write_bytes(pickle.dumps(Evil()))
    watch.is_on = True

    MARAHead.from_pretrained(folder)

    assert watch.seen == [] and not Path("pwned").exists()


def test_links_within_the_folder_and_of_the_hubs_cache_are_fine(place):
    folder = random_head(WIDTH, "residual", inner_sizes=(6, 4)).save_pretrained(place / "repo/snapshots/abc")
    (place / "repo/blobs").mkdir()
    for name in ("head_config.json", "head.safetensors"):
        (folder / name).rename(place / "repo/blobs" / name)
        (folder / name).symlink_to(f"../../blobs/{name}")
    current = place / "current"
    current.symlink_to(folder)

    assert MARAHead.from_pretrained(current).config.hidden_size == WIDTH


def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(place, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **_: asked.append(args))
    cache = HeadCache(grace_s=0)
    random_head(WIDTH, "residual", inner_sizes=(6, 4)).save_pretrained("heads/brand")
    cache.get("heads/brand")

    os.rename("heads", "gone")

    with pytest.raises(HeadError, match="'heads/brand'"):
        MARAHead.from_pretrained(Path("heads/brand"))
    with pytest.raises(HeadError, match="heads/brand"):
        cache.get("heads/brand")
    assert asked == []
