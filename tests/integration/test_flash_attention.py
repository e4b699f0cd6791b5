"""What prefill asks of FlashAttention, which no CPU has."""

import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from vllm_ffa_fp8fp8.integration.compat import load_flash_attention

BATCH = (*[torch.zeros(3, 2, 64)] * 3, *[torch.tensor([0, 3])] * 2, 3, 3, 0.125)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("soft_cap", [None, 50.0])
def test_soft_cap_reaches_the_build_of_vllm(monkeypatch, version, soft_cap):
    asked = {}

    def get_flash_attn_version(**options):
        asked.update(options)
        return version

    def attend(*batch, **options):
        asked.update(options)

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", get_flash_attn_version)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", attend, raising=False)
    load_flash_attention(256, logits_soft_cap=soft_cap)(*BATCH, torch.zeros(3, 2, 64))
    assert asked["requires_softcap"] == bool(soft_cap)
    assert asked["softcap"] == (soft_cap or 0.0) and asked["fa_version"] == version


def test_soft_cap_reaches_flash_attn(monkeypatch):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **options: None)
    given = []

    def flash_attn_varlen_func(*batch, softmax_scale, causal, softcap=0.0):
        given.append(softcap)
        return torch.ones(3, 2, 64)

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    for soft_cap in (None, 50.0):
        output = torch.zeros(3, 2, 64)
        load_flash_attention(64, logits_soft_cap=soft_cap)(*BATCH, output)
        assert output.all()
    assert given == [0.0, 50.0]
    package.flash_attn_varlen_func = lambda *batch, softmax_scale, causal: None
    with pytest.raises(ImportError, match="needs flash-attn 2.6 or newer for a soft cap"):
        load_flash_attention(64, logits_soft_cap=50.0)
    load_flash_attention(64)
