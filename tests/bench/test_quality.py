"""The judge of settings: its arithmetic, whom it judges, what it runs and reports; no engine."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from vllm_ffa_fp8fp8.attention.stats import SUMS
from vllm_ffa_fp8fp8.bench.quality.engine import (
    Run,
    check_model,
    make_references,
    reference_path,
    with_ours,
    without_ours,
)
from vllm_ffa_fp8fp8.bench.quality.judge import JudgedText, TextJudge, compare, log_softmax
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT, FP8_CACHE, Texts, floor_name, plan_engines
from vllm_ffa_fp8fp8.bench.quality.report import (
    Report,
    by_layer,
    layer_tables,
    main_table,
    summary,
)
from vllm_ffa_fp8fp8.settings import parse_setting

VOCAB = 7


def test_divergence_of_distributions():
    reference = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    other = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    kl, agrees = compare(reference, other)
    assert kl == pytest.approx(0.5 * math.log(2), abs=1e-7) and agrees
    assert compare(other, reference)[0] == math.inf
    assert compare(reference, torch.tensor([0.2, 0.3, 0.25, 0.25]).log())[1] is False
    tied = torch.tensor([0.3, 0.3, 0.2, 0.2]).log()
    assert compare(reference, tied)[1] and compare(tied, reference.flip(0)[[3, 2, 0, 1]])[1]


def test_equal_logits_do_not_diverge():
    logits = 4 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    log_probs = log_softmax(logits)
    assert compare(log_probs, log_softmax(logits.clone())) == (0.0, True)
    expected = np.float64(logits.numpy())
    expected -= expected.max() + np.log(np.exp(expected - expected.max()).sum())
    assert np.allclose(log_probs.numpy(), expected, rtol=1e-7, atol=0)
    assert 1e-5 < compare(log_probs, log_softmax(logits.bfloat16().float()))[0] < 0.1


@pytest.fixture
def text(tmp_path):
    """A judged text of which tokens 5, 3 and 6 are forced, the first by prefill."""
    for name, columns, dtype in (("figures", 3, np.float64), ("log_probs", VOCAB, np.float32)):
        np.full((2, columns), np.nan, dtype).tofile(tmp_path / name)
    return JudgedText([5, 3, 6], 10, str(tmp_path / "figures"), str(tmp_path / "log_probs"), True)


def figures(text):
    return np.fromfile(text.figures).reshape(2, 3)


def logits_of(*seeds):
    return torch.stack(
        [torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def forced(logits):
    return [row.argmax().item() if math.inf in -row else None for row in logits]


def test_v1_rows_are_followed_through_the_batch(text):
    """Other requests' rows stay as they are, and requests move to other rows."""
    judge, output = TextJudge(None, None, False), []
    other = (0, SamplingParams(), [1], [])
    judge.update_state(BatchUpdate(2, [], [other, (1, text.sampling_params(), [1], output)], []))
    logits = logits_of(1, 2)
    assert forced(judge.apply(logits)) == [None, 5]
    assert np.isnan(figures(text)).all()  # what prefill gives is not judged
    output.append(5)
    judge.update_state(BatchUpdate(2, [0], [], [(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    logits = logits_of(3)
    expected = log_softmax(logits[0])
    assert forced(judge.apply(logits)) == [3]
    assert figures(text)[0].tolist() == [0.0, 1.0, -float(expected[3])]
    assert np.isnan(figures(text)[1]).all()
    output.append(3)
    judge.apply(logits_of(4))
    judge.update_state(BatchUpdate(0, [0], [], []))
    assert forced(judge.apply(logits_of(5))) == [None]
    rows = np.fromfile(text.log_probs, np.float32).reshape(2, -1)
    assert np.array_equal(rows[0], expected) and np.array_equal(
        rows[1], log_softmax(logits_of(4)[0])
    )


def context(slots, seq_lens):
    """Of a step of V2, whose arrays may be padded."""
    return SimpleNamespace(
        idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array([*seq_lens, 0])
    )


def test_v2_rows_are_found_by_slot_and_length(text):
    judge = TextJudge(None, None)
    assert judge.add_request(4, text.sampling_params())
    assert not judge.add_request(2, SamplingParams())
    logits = judge.apply(logits_of(1, 2), context([2, 4], [6, 7]))
    assert forced(logits) == [None, None]  # the prompt is not all read
    assert forced(judge.apply(logits_of(1, 2), context([4, 2], [10, 7]))) == [5, None]
    judge.apply(logits_of(3), context([4], [11]))
    judge.apply(logits_of(4), context([4], [12]))
    assert figures(text)[:, 2].tolist() == [
        -float(log_softmax(logits_of(3)[0])[3]),
        -float(log_softmax(logits_of(4)[0])[6]),
    ]
    judge.add_request(4, SamplingParams())  # the slot is another's now
    assert forced(judge.apply(logits_of(5), context([4], [10]))) == [None]


def test_a_setting_is_compared_with_the_reference(text):
    for is_reference in (True, False):
        judge = TextJudge(None, None)
        same = JudgedText(text.tokens, 10, text.figures, text.log_probs, is_reference)
        judge.add_request(0, same.sampling_params())
        judge.apply(logits_of(3), context([0], [11]))
        judge.apply(logits_of(4) + (0 if is_reference else logits_of(9)), context([0], [12]))
    (equal, _, _), (other, _, _) = figures(text)
    assert equal == 0.0
    expected = compare(log_softmax(logits_of(4)[0]), log_softmax(logits_of(4, 9).sum(0)))
    assert other == expected[0] > 0.01


def test_settings_that_differ_in_delta_share_an_engine():
    names = ("delta=2", "delta=5,block_size=16", "exact", "delta=8", "delta=2,block_size=16")
    settings = [parse_setting(name) for name in names]
    engines = plan_engines(settings, {"model": "m"}, floor=[4, 16], fp8_cache=True)
    assert [engine.name for engine in engines] == [
        f"{DEFAULT}; {floor_name(4)}; {floor_name(16)}",
        "delta=2; delta=8",
        "delta=5,block_size=16; delta=2,block_size=16",
        "exact",
        FP8_CACHE,
    ]
    job = engines[1].job(Texts(["t"], [[1, 2]]), 1, "f", settings)
    assert job["options"]["delta"] == 2.0 and job["llm"] == {"model": "m"}
    assert [run["limit"] for run in job["runs"]] == [2.0, 8.0]
    assert engines[3].runs[0]["limit"] is None
    assert engines[-1].job(Texts([], []), 1, "f", [])["options"] is None
    assert engines[-1].llm == {"model": "m", "kv_cache_dtype": "fp8"}
    assert [run["copies"] for run in engines[0].runs] == [1, 4, 16]
    copies = [engine.job(Texts([], []), 1, "f", [])["copies"] for engine in engines]
    assert copies == [16, 4, 4, 4, 4]
    assert [run["is_reference"] for run in engines[0].runs] == [True, False, False]


def judged_text(kl, kept, total, short=0):
    plain = dict.fromkeys((*SUMS, "most_left_mass"), 0) | {"squares": None}
    counts = plain | {"total_blocks": total, "short_blocks": short}
    layers = [counts | {"layer": 3 * n, "kept_blocks": k} for n, k in enumerate(kept)]
    return {"figures": [[value, 1.0, 2.0] for value in kl], "layers": layers}


def test_report(tmp_path):
    texts = Texts(["a", "a", "b", "b"], [[0] * n for n in (10, 20, 10, 20)])
    settings = [parse_setting(name) for name in ("exact", "delta=5", "delta=3")]
    plan = plan_engines(settings, {}, floor=[], fp8_cache=False)
    order = [setting.name for setting in settings]
    report = Report({"model": "x/m"}, texts, 2, order, [10, 20], tmp_path / "q.json")
    default = [judged_text([0.0, 0.0], [], 0)] * 4
    report.put(plan[0], {"backend": "B", "runs": [default]})
    report.put(plan[2], {"backend": "F", "runs": [[judged_text([0.1, 0.3], [1, 3], 4)] * 4] * 2})
    report.put(plan[1], {"backend": "F", "runs": [[judged_text([0.5, 0.7], [0, 0], 0, 4)] * 4]})
    for length in (10, 20):
        content = json.loads((tmp_path / f"q-{length}.json").read_text())
        assert content["tokens"] == length and content["text"] == "a, b"
        assert [found["name"] for found in content["settings"]] == [DEFAULT, *order]
        first, exact, fast, _ = content["settings"]
        assert (first["kept"], first["kept_by_layer"], first["options"]) == (1.0, [], None)
        assert exact["kept"] == 1.0 and exact["kept_by_layer"] == [1.0, 1.0]
        assert fast["kept"] == 0.5 and fast["kept_by_layer"] == [0.25, 0.75]
        assert fast["kl_mean"] == pytest.approx(0.2) and fast["kl_max"] == 0.3
        assert fast["kl_error"] == pytest.approx(0.1 / 2) and fast["agree"] == 1.0
        assert fast["loss"] == 2.0 and fast["options"]["delta"] == 5.0
        assert [part["tokens"] for part in fast["texts"]] == [length, length]
    assert {file.name for file in tmp_path.iterdir()} == {"q-10.json", "q-20.json"}


def test_what_was_left_and_what_it_changed():
    text, other = judged_text([0.1], [1, 3], 4), judged_text([0.3], [1, 3], 4)
    for judged, left, squares in ((text, 0.5, [0.25, 1.0]), (other, 1.0, [0.75, 3.0])):
        judged["layers"][0] |= {"left_mass": left, "tokens": 10, "most_left_mass": left / 2}
        judged["layers"][0]["squares"], judged["layers"][1]["squares"] = squares, [0.0, 2.0]
    found = by_layer([text, other])
    assert found["left_by_layer"] == [1.5 / 20, 0.0] and found["error_by_layer"] == [0.5, 0.0]
    total = summary([text, other])
    assert (total["left"], total["left_most"]) == (1.5 / 20, 0.5)
    text["layers"][0]["squares"] = None
    assert by_layer([text])["error_by_layer"] == []
    assert by_layer([{"figures": [[0.0, 1.0, 2.0]], "layers": []}])["left_by_layer"] == []
    entries = [summary([text, other]) | found | {"name": "tau=0.1"}]
    assert "left to the draw" in [column.header for column in main_table(entries, "").columns]
    tables = list(layer_tables(entries))
    assert all(list(table.columns[0].cells) == ["0", "3"] for table in tables)
    titles = [table.title for table in tables]
    assert [title.split()[0] for title in titles] == ["Kept", "Left", "Error"]


def run_of(tokens_of_answer, counted, expected):
    """A run whose engine answers so, on a text of 6 tokens of which 2 are judged."""

    class Engine:
        def generate(self, prompts, params, use_tqdm):
            answer = SimpleNamespace(token_ids=tokens_of_answer)
            return [SimpleNamespace(outputs=[answer], num_cached_tokens=0)] * len(prompts)

        def collective_rpc(self, name, args=()):
            if name == "ffa_layer_errors":
                return [{}]
            if name == "ffa_blocks_to_read":
                assert args == ([4, 5],)
                return [expected]
            counts = dict.fromkeys((*SUMS, "most_left_mass"), 0)
            counts |= {"kept_blocks": 1, "total_blocks": counted}
            layers = [{"layer": 0} | counts]
            return [counts | {"layers": layers, "cache_bytes_per_token": 0}]

    job = {"options": {}, "texts": [[1, 2, 3, 4, 5, 6]], "last": 2}
    return Run(Engine(), job, {"name": "a", "copies": 1}, print)


def test_a_wrong_token_and_blocks_that_decode_did_not_read_are_seen():
    text = JudgedText([4, 5, 6], 3)
    run = run_of([4, 5, 6], 8, 8)
    run.generate([1, 2, 3, 4, 5, 6], [text])
    assert run.count_blocks(text)[0]["kept"] == 1 / 8
    with pytest.raises(RuntimeError, match="was not led along the text"):
        run_of([4, 5, 7], 8, 8).generate([1, 2, 3, 4, 5, 6], [text])
    with pytest.raises(RuntimeError, match="6 blocks instead of 8"):
        run_of([4, 5, 6], 6, 8).count_blocks(text)


def test_the_reference_has_none_of_ours():
    """Where the user names FFA_FP8FP8 for some kinds of layers, others keep what they have."""
    plain = {"model": "m", "attention_config": {"flash_attn_version": 3}}
    kinds = {"full_attention": "FFA_FP8FP8", "sliding_window": "TRITON_ATTN"}
    some = {"model": "m", "attention_config": {"backend_per_kind": kinds}}
    assert with_ours(plain, {})["attention_backend"] == "FFA_FP8FP8"
    assert without_ours(plain) == plain
    ours = with_ours(some, {"tau": 0.1})
    assert ours == some | {"additional_config": {"ffa_fp8fp8": {"tau": 0.1}}}
    left = without_ours(ours)["attention_config"]
    assert left == {"backend_per_kind": {"sliding_window": "TRITON_ATTN"}}
    assert kinds["full_attention"] == "FFA_FP8FP8"


def test_references_need_room_and_the_models_own_tokens(tmp_path):
    job = {"last": 2, "texts": [[1, 6]], "folder": str(tmp_path)}
    make_references(job, VOCAB)
    assert reference_path(job, 0).stat().st_size == 2 * VOCAB * 4
    with pytest.raises(ValueError, match="token 6 of a text, and the model knows 6"):
        make_references(job, 6)
    with pytest.raises(ValueError, match="TMPDIR"):
        make_references(job | {"last": 2**50}, VOCAB)


@pytest.mark.parametrize(
    "change, setting, says",
    [
        ({"sliding_window": 512}, "fast", "without full attention"),
        ({"head_dim": 100}, "fast", "head_size 100"),
        ({"num_attention_heads": 64}, "fast", "64 query heads over 2 KV heads"),
        ({}, "dense_layers=[4]", "the model has no layer 4"),
    ],
)
def test_a_model_that_cannot_run_is_refused_by_its_configuration(tmp_path, change, setting, says):
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "dtype": "bfloat16",
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "hidden_size": 384, "intermediate_size": 512, "vocab_size": 2048,
        "max_position_embeddings": 4096, "sliding_window": None, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    llm = {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 512}
    assert change or check_model(llm, [parse_setting("fast").options]) == 2048
    with pytest.raises(ValueError, match=says):
        check_model(llm, [parse_setting(setting).options])
