"""attn_implementation="strobe": equal greedy tokens, masks included."""

from __future__ import annotations

import pytest
import torch
import transformers

from strobe.errors import ProblemError
from strobe.integrations import transformers as strobe_transformers

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_attention_heads=6, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, sliding_window=5
    ),
    "qwen2": transformers.Qwen2Config(**SMALL, num_attention_heads=6, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=8),
    "gemma2": transformers.Gemma2Config(  # softcap
        **SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=8, sliding_window=5
    ),
    "gpt_oss": transformers.GptOssConfig(  # sinks
        **SMALL,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=48, n_head=6, n_layer=2, vocab_size=97, n_positions=64, pad_token_id=0
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_equal(family: str) -> None:
    strobe_transformers.register()
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    prompt = torch.randint(1, 97, (3, 9))
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # left padding
    tokens = {}
    for implementation in ("eager", "strobe"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(
            prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    assert torch.equal(tokens["eager"], tokens["strobe"])


def test_logits_are_equal_without_a_mask() -> None:
    strobe_transformers.register()
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    prompt = torch.randint(1, 97, (2, 13))
    logits = {}
    for implementation in ("eager", "strobe"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(prompt).logits
    torch.testing.assert_close(logits["strobe"], logits["eager"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_cache_of_a_fixed_size(family: str) -> None:
    """Its keys are more than the prompt's, which transformers gives without a mask."""
    strobe_transformers.register()
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    prompt = torch.randint(1, 97, (2, 9))
    options = {"cache_implementation": "static", "eos_token_id": None, "output_scores": True}
    scores = {}
    for implementation in ("eager", "strobe"):
        model.set_attn_implementation(implementation)
        made = model.generate(
            prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **options
        )
        scores[implementation] = torch.stack(made.scores)
    torch.testing.assert_close(scores["strobe"], scores["eager"], atol=1e-4, rtol=0)


def test_values_narrower_than_keys() -> None:
    strobe_transformers.register()
    query, key, value = torch.randn(2, 6, 7, 16), torch.randn(2, 6, 7, 16), torch.randn(2, 6, 7, 10)
    module = torch.nn.Module()
    out, _ = strobe_transformers.attention_forward(module, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=0)


def test_more_causal_queries_than_keys_are_refused() -> None:
    query, key = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ProblemError, match="7 causal queries of 5 keys"):
        strobe_transformers.attention_forward(torch.nn.Module(), query, key, key, None)
