"""Files: whole or not at all, and nothing in them is trusted."""

import base64
import errno
import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparsekit import files
from sparsekit.files import pack_state, read_json, read_tensors, unpack_state, write_json, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(12.0).view(3, 4).t(),  # not contiguous
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False]),
    }


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def packed():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    state = {"fc.weight": torch.arange(1.0, 7).view(2, 3) * mask, "fc.bias": torch.ones(2)}
    return *pack_state(state, {"fc.weight": mask}), state, mask


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(), {"recipe": {"rounds": [1, 2]}, "name": "ü"})
    got, header = read_tensors(path)
    assert header == {"version": 2, "recipe": {"rounds": [1, 2]}, "name": "ü"}
    assert got.keys() == tensors().keys()
    for name, want in tensors().items():
        assert got[name].dtype == want.dtype and torch.equal(got[name], want)


VERSION_1 = base64.b85decode(
    "m;nF)00000dm>+7ZDn*}WMOn+Utc0Rdm?jiVRCb2YiV>MIwE^qB6ekRb7^mGTp~IkF)SclB6DbAaAk8`B03;@Tq0&;E_Y>VXJ~X>"
    "B03;jGAtl7U41MdTq0y;ZgXjLd0ZkoATTa9EFfGWZDDh3b6g@iAY3A4V=*^4I5#k4V>mZ8GB7YUHZo>0WMepHGBsmmIW}T7H#jmi"
    "IWuE5I5TEpWjADDW;tarIAJk0Hexh4Wny7mA}k<WB64M8X>es+B03;@Tq1IBb#7#HTp~IkGktv`eJmnoV=iK8VRIrndm?0Xd2nSS"
    "IwD3hG9oM@b7*03Wg<FTGF>bpWMOn+UvFk+b7gdMB05_zEI3_#EFxxOE_Y>VXJ~XHI(s5yba`-PB03^QGcqD9B6DbAaAhJoTQglO"
    "B4lB7VP9`%W^-k9b0RuhI4m+SU41MfW@9dQWoc(<bR%tHb88|xdm?0Xd2nSSIwDm#A}k_vXkl<=B05_!T`VGGVRT_%Z)Rq5Wpr~Q"
    "I$JU@EHW`&eSIJxARr(h004kL004kL004kL002Nh005vs6#"
)


def test_files_of_version_1_are_read(tmp_path, packed):
    _, _, state, mask = packed
    (tmp_path / "a").write_bytes(VERSION_1)
    tensors, header = read_tensors(tmp_path / "a")
    got, masks = unpack_state(tensors, header)
    assert header["version"] == 1 and header["recipe"] == {"rounds": 3}
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
    assert torch.equal(masks["fc.weight"], mask)


@pytest.mark.parametrize("where", ["a value", "a header"])
def test_a_changed_bit_is_noticed(tmp_path, where):
    path = tmp_path / "a"
    write_tensors(path, {"weight": torch.tensor([1.0, 3.0])}, {"recipe": "good"})
    whole = path.read_bytes()
    changed = whole[:-1] + b"A" if where == "a value" else whole.replace(b"good", b"evil")
    assert changed != whole and read_tensors(path)
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="a: Expected contents with the SHA-256 in the header"):
        read_tensors(path)


def test_keys_from_a_later_version_are_kept(tmp_path):
    write_tensors(tmp_path / "a", {}, {"later": {"1": [None, 0.1]}, "sha256": "none", "version": 9})
    assert read_tensors(tmp_path / "a")[1] == {"version": 2, "later": {"1": [None, 0.1]}}


def test_tensors_that_share_memory_are_written_each(tmp_path):
    one = torch.arange(4.0)
    write_tensors(tmp_path / "a", {"a": one, "b": one, "c": one[1:]}, {})
    got, _ = read_tensors(tmp_path / "a")
    assert torch.equal(got["b"], one) and torch.equal(got["c"], one[1:])


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": "é"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_new_files_obey_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_tensors(tmp_path / "a", {}, {})
        write_json(tmp_path / "b", {})
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o666 & ~umask] * 2


@pytest.mark.parametrize("broken", ["save_file", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path, other = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tensors(path, {"old": torch.ones(2)}, {})
    write_json(other, "old")
    monkeypatch.setattr(f"sparsekit.files.{broken}", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_tensors(path, {"new": torch.ones(200)}, {})
    if broken != "save_file":
        with pytest.raises(OSError, match="No space"):
            write_json(other, "new")
    monkeypatch.undo()
    assert read_tensors(path)[0].keys() == {"old"} and read_json(other) == "old"
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_what_safetensors_calls_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, monkeypatch):
    def fail(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match=r"a\.safetensors: .*No space left"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [1, 2, object()])
    assert read_json(tmp_path / "a.json") == 1 and len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_be_written_to(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.json: Expected a file in an existing directory, got no .*gone"):
        write_json(tmp_path / "gone" / "x.json", {})
    with pytest.raises(IsADirectoryError, match="Expected the name of a file, got a directory"):
        write_tensors(tmp_path, {}, {})


def test_torn_files_are_refused_at_every_length(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(), {})
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors: Expected a whole safetensors file"):
            read_tensors(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors: .*no such file"):
        read_tensors(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "plain", {"format": "pt"})
    with pytest.raises(ValueError, match="plain: Expected a file that sparsekit wrote"):
        read_tensors(tmp_path / "plain")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("{", "Expected a JSON header"),
        ("[1]", "Expected a JSON header"),
        ("{}", "Expected a JSON header"),
        ('{"version": "x"}', "Expected a JSON header"),
        ("[" * 100_000, "Expected a JSON header"),
        ('{"version": true}', "Expected a JSON header"),
        ('{"version": 0}', "Expected a JSON header"),
        ('{"version": 3}', "Expected file version 2 or older, got 3; upgrade"),
        ('{"version": 2}', "Expected contents with the SHA-256 in the header"),
    ],
)
def test_headers_that_are_none(tmp_path, header, why):
    save_file({"a": torch.ones(1)}, tmp_path / "a", {"sparsekit": header})
    with pytest.raises(ValueError, match=why):
        read_tensors(tmp_path / "a")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(tmp_path, dump):
    path, mark = tmp_path / "a.safetensors", tmp_path / "mark"
    with path.open("wb") as file:
        dump(Bomb(mark), file)
    with pytest.raises(ValueError, match="torn or foreign"):
        read_tensors(path)
    assert not mark.exists()
    with path.open("rb") as file:
        pickle.load(file) if dump is pickle.dump else torch.load(file, weights_only=False)
    assert mark.exists()  # it would have gone off


@pytest.mark.parametrize("text", ["", '{"a": 1', "[" * 100_000, "\x80"])
def test_torn_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: Expected JSON"):
        read_json(tmp_path / "a.json")


def test_pack_keeps_survivors_only_and_unpack_gives_all_back(packed):
    packed_state, header, state, mask = packed
    assert packed_state["fc.weight"].tolist() == [1, 3, 5]
    assert json.loads(json.dumps(header)) == header and header["density"] == 0.5
    got, masks = unpack_state(packed_state, header)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
    assert masks.keys() == {"fc.weight"} and torch.equal(masks["fc.weight"], mask)


def test_pack_keeps_strange_survivors_bit_for_bit():
    weight = torch.tensor([[float("nan"), -0.0], [float("inf"), 1.0]])
    mask = torch.tensor([[True, True], [True, False]])
    got, _ = unpack_state(*pack_state({"w": weight}, {"w": mask}))
    assert got["w"].view(torch.int32).tolist() == (weight.view(torch.int32) * mask).tolist()


def test_a_mask_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"gone\.weight: Expected a weight for every mask"):
        pack_state({}, {"gone.weight": torch.ones(1, 1, dtype=torch.bool)})


def edit(tensors, header, what):
    bits = tensors["fc.weight#mask"]
    if what == "too few bits":
        tensors["fc.weight#mask"] = bits[:0]
    elif what == "too many bits":
        tensors["fc.weight#mask"] = torch.cat([bits, bits])
    elif what == "bits of another type":
        tensors["fc.weight#mask"] = bits.long()
    elif what == "one survivor more":
        tensors["fc.weight#mask"] = bits | 2
    elif what == "another survivor":
        tensors["fc.weight#mask"] = (bits & ~1) | 2
    elif what == "survivors in rows":
        tensors["fc.weight"] = tensors["fc.weight"].view(1, 3)
    elif what == "no bits":
        del tensors["fc.weight#mask"]
    elif what == "no survivors":
        del tensors["fc.weight"]
    elif what == "no shape":
        header["weights"] = {}
    elif what == "no shapes":
        del header["weights"]
    elif what == "a shape of text":
        header["weights"]["fc.weight"]["shape"] = "2x3"
    elif what == "a negative shape":
        header["weights"]["fc.weight"]["shape"] = [-2, -3]
    elif what == "a huge shape":
        header["weights"]["fc.weight"]["shape"] = [2**40, 2**40]
    elif what == "no facts":
        header["weights"]["fc.weight"] = None
    elif what == "another shape":
        header["weights"]["fc.weight"]["shape"] = [3, 2]
    elif what in ("pattern", "coding", "count"):
        header["weights"]["fc.weight"][what] = "__import__('os')"


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("too few bits", r"fc\.weight: Expected 1 mask bytes"),
        ("too many bits", r"fc\.weight: Expected 1 mask bytes"),
        ("bits of another type", r"fc\.weight: Expected mask bytes in one row of uint8"),
        ("one survivor more", r"fc\.weight: Expected 3 living groups, got 4"),
        ("another survivor", "digest in the header"),
        ("survivors in rows", r"fc\.weight: Expected 3 survivors"),
        ("no bits", r"fc\.weight: Expected survivors, mask bits and a shape"),
        ("no survivors", r"fc\.weight: Expected survivors"),
        ("no shape", r"fc\.weight: Expected survivors, mask bits and a shape"),
        ("no shapes", "Expected a header with the shapes"),
        ("a shape of text", r"fc\.weight: Expected mask bits and a shape"),
        ("a negative shape", r"fc\.weight: Expected mask bits and a shape"),
        ("a huge shape", r"Expected weights of at most \d+ bytes in a file of this size"),
        ("no facts", "Expected a header with the shapes"),
        ("another shape", "digest in the header"),
        ("pattern", r"fc\.weight: Expected a pattern 'unstructured'"),
        ("coding", r"fc\.weight: Expected a mask coded as bitmap or elias-fano"),
        ("count", r"fc\.weight: Expected a count of at most 6 groups"),
    ],
)
def test_packed_states_that_do_not_fit_together(packed, what, why):
    packed_state, header, _, _ = packed
    edit(packed_state, header, what)
    with pytest.raises(ValueError, match=why):
        unpack_state(packed_state, header)
