"""Recordings on disk: whole, damaged, foreign, on a full disk; prompts; what `record` refuses."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recordings import LENGTHS, SHAPE, header, requests, write_recording

from vllm_ffa_fp8fp8.bench.recording.engine import check_disk, choose_layers, layer_bytes, passes_of
from vllm_ffa_fp8fp8.bench.recording.prompts import cut_prompts, read_prompts
from vllm_ffa_fp8fp8.bench.recording.store import INDEX, Recording
from vllm_ffa_fp8fp8.bench.recording.worker import problem_of


def test_a_recording_comes_back_as_it_was(tmp_path):
    write_recording(tmp_path / "new" / "folder")
    recording = Recording.open(tmp_path / "new" / "folder")
    assert recording.header == header()
    assert (recording.layers, recording.lengths) == ([0, 2], list(LENGTHS))
    loaded = recording.load(2)
    assert loaded.shape == SHAPE
    for found, written in zip(loaded.requests, requests(2), strict=True):
        for name in ("query", "key", "value", "hidden"):
            assert torch.equal(getattr(found, name), getattr(written, name))
    assert [r.prompt_tokens for r in loaded.requests] == list(LENGTHS)
    names = {"layer-000.safetensors", "layer-002.safetensors", INDEX}
    assert {path.name for path in recording.folder.iterdir()} == names


def test_the_same_command_adds_layers_and_another_one_is_refused(tmp_path):
    write_recording(tmp_path, (0,))
    assert write_recording(tmp_path, (3,)).layers == [0, 3]
    with pytest.raises(ValueError, match="another recording .its model differ"):
        Recording.begin(tmp_path, header(model="models/other"))
    assert Recording.open(tmp_path).layers == [0, 3]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def replace_by_other(path: Path) -> None:
    shutil.copy(path.with_name("layer-000.safetensors"), path)


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "is damaged, or of another recording"),
        (flip, "is damaged, or of another recording"),
        (replace_by_other, "is damaged, or of another recording"),
        (Path.unlink, "cannot be read: No such file"),
    ],
)
def test_a_damaged_layer_is_found(tmp_path, damage, says):
    recording = write_recording(tmp_path)
    damage(tmp_path / "layer-002.safetensors")
    with pytest.raises(ValueError, match=says):
        recording.load(2)
    recording.load(0)


def edit(change):
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    "damage, says",
    [
        (Path.unlink, "holds no recording: make one with `ffa-fp8fp8 record`"),
        (cut, "is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not text"),
        (lambda path: path.write_text("[]"), "is not a JSON object"),
        (edit(lambda c: c.update(recording=9)), "format is 9"),
        (edit(lambda c: c.pop("prompts")), "'prompts' is missing"),
        (edit(lambda c: c.update(steps=0)), "no decode steps"),
        (edit(lambda c: c["layers"]["0"].pop("digest")), "'digest' is missing"),
        (edit(lambda c: c["layers"]["0"]["shape"].pop("scale")), "scale"),
    ],
)
def test_a_damaged_or_foreign_index_is_found(tmp_path, damage, says):
    write_recording(tmp_path)
    damage(tmp_path / INDEX)
    with pytest.raises(ValueError, match=says):
        Recording.open(tmp_path)


def test_a_layer_of_other_prompts_is_found(tmp_path):
    write_recording(tmp_path)
    edit(lambda c: c["prompts"][0].append(1))(tmp_path / INDEX)
    with pytest.raises(ValueError, match="key of request 0 is .153, 2, 32., not .154, 2, 32."):
        Recording.open(tmp_path).load(0)


def test_an_unknown_layer_is_named_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match="no layer 1; recorded are: 0, 2"):
        write_recording(tmp_path).load(1)


def test_a_full_disk_leaves_what_was_finished(tmp_path, monkeypatch):
    write_recording(tmp_path, (0,))

    def write_half(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(ValueError, match="layer-001.*cannot be written: No space left on device"):
        write_recording(tmp_path, (1,))
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"layer-000.safetensors", INDEX}
    assert Recording.open(tmp_path).load(0).index == 0


def test_too_little_disk_is_said_before_any_work(tmp_path):
    check_disk(tmp_path, 1)
    with pytest.raises(ValueError, match="too full: .* GB are needed"):
        check_disk(tmp_path, 10**18)


def test_layers_are_chosen_by_index():
    plain = {"problem": None}
    found = {0: plain, 1: {"problem": "FFA_FP8FP8 does not support sliding windows: ..."}, 2: plain}
    assert choose_layers(None, found) == [0, 2]
    assert choose_layers([2, 0, 2], found) == [0, 2]
    with pytest.raises(ValueError, match="no attention layer 7; it has: 0, 1, 2"):
        choose_layers([0, 7], found)
    with pytest.raises(ValueError, match="layer 1: FFA_FP8FP8 does not support sliding windows"):
        choose_layers([1], found)
    with pytest.raises(ValueError, match="no layer that FFA_FP8FP8 runs: .*sliding"):
        choose_layers(None, {1: found[1]})


def test_layers_that_do_not_fit_memory_together_take_more_passes():
    assert list(passes_of({0: 4, 1: 4, 2: 4, 5: 20, 6: 1}, 8)) == [[0, 1], [2], [5], [6]]
    assert list(passes_of({}, 8)) == []


def test_the_size_of_a_layer_is_known_before_it_is_recorded(tmp_path):
    write_recording(tmp_path)
    size = (tmp_path / "layer-000.safetensors").stat().st_size
    expected = layer_bytes(vars(SHAPE), header())
    assert expected < size < expected + 2000
    assert layer_bytes(vars(SHAPE), header(hidden="all")) == expected + 2 * 48 * sum(LENGTHS)


def test_prompts_are_texts_or_lines(tmp_path):
    text, lines = tmp_path / "a.py", tmp_path / "b.jsonl"
    text.write_text("one\ntwo\n")
    lines.write_text('"three"\n\n{"prompt": "four"}\n{"text": "five"}\n')
    prompts = read_prompts([text, lines])
    assert [prompt for _, prompt in prompts] == ["one\ntwo\n", "three", "four", "five"]
    assert prompts[2][0] == f"{lines}:2"
    sources, tokens = cut_prompts(prompts[:1], [2, 4], lambda text: list(range(5)))
    assert (sources, tokens) == ([str(text)] * 2, [[0, 1], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match="a.py is too short: 5 tokens, and --tokens asks for 6"):
        cut_prompts(prompts[:1], [6], lambda text: list(range(5)))


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("binary.txt", b"\xff\xfe", "not UTF-8"),
        ("empty.txt", b" \n", "has no text"),
        ("empty.jsonl", b"", "no prompt in it"),
        ("bad.jsonl", b'"good"\n{"question": 1}\n', "line 2: neither a JSON string"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, data, says):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_prompts([path])


@pytest.mark.parametrize("other", [{"logits_soft_cap": 50.0}, {"sinks": torch.zeros(8)}], ids=str)
def test_what_bench_layers_would_leave_out_is_not_recorded(other):
    layer = {"num_heads": 8, "num_kv_heads": 2, "sliding_window": None, "attn_type": "decoder"}
    layer["kv_sharing_target_layer_name"] = None
    plain = {"logits_soft_cap": 0, "sinks": None}
    assert problem_of(SimpleNamespace(**layer, impl=SimpleNamespace(**plain))) is None
    problem = problem_of(SimpleNamespace(**layer, impl=SimpleNamespace(**plain | other)))
    assert problem == "a soft cap of logits and sinks are not recorded"
