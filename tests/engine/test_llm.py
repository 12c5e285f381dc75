"""`LLM`, the way a user calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strobe.engine import LLM, EngineConfig, SamplingParams
from strobe.errors import CheckpointError, RequestError, SettingsError, StrobeError
from strobe.models.network import tensors

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, device="cpu", config=EngineConfig(kv_cache_pages=200)) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    yield
    assert not llm.engine.has_work
    assert llm.engine.scheduler.cache.used == 0
    llm.engine.scheduler.check()


def test_one_prompt_many_prompts_and_token_ids(llm):
    (one,) = llm.generate("hello", GREEDY)
    two = llm.generate(["hello", "other"], [GREEDY, GREEDY])
    (three,) = llm.generate([llm.tokenizer.encode("hello")], GREEDY)
    assert one.token_ids == two[0].token_ids == three.token_ids
    assert one.text == llm.tokenizer.decode(one.token_ids)
    assert one.metrics.output_tokens == 20
    assert 0 < one.metrics.ttft_s <= one.metrics.e2e_s
    assert llm.generate([]) == []


def test_stream_is_generate_in_pieces(llm):
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True, logprobs=1)
    (whole,) = llm.generate("hello", params)
    chunks = list(llm.stream("hello", params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert len([entry for chunk in chunks for entry in chunk.logprobs]) == 40
    assert all(len(chunk.token_ids) == 1 for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * 39
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].metrics.output_tokens == 40
    assert [chunk.metrics for chunk in chunks[:-1]] == [None] * 39


def test_streams_interleave(llm):
    wanted = [llm.generate(prompt, GREEDY)[0].text for prompt in ("a", "b")]
    streams = [llm.stream(prompt, GREEDY) for prompt in ("a", "b")]
    texts = ["", ""]
    for pair in zip(*streams, strict=True):
        for index, chunk in enumerate(pair):
            texts[index] += chunk.text
    assert texts == wanted


def test_generate_inside_a_stream(llm):
    wanted = llm.generate("a", GREEDY)[0].text
    text = ""
    for position, chunk in enumerate(llm.stream("a", GREEDY)):
        text += chunk.text
        if position == 3:
            assert llm.generate("b", GREEDY)[0].metrics.output_tokens == 20
    assert text == wanted


def test_a_closed_stream_frees_its_pages(llm):
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert llm.engine.scheduler.cache.used > 0
    stream.close()
    assert llm.engine.scheduler.cache.used == 0
    llm.stream("never begun", GREEDY)


def test_n_outputs(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=15, ignore_eos=True)
    (whole,) = llm.generate("hello", params)
    texts = ["", "", ""]
    last = None
    for chunk in llm.stream("hello", params):
        texts[chunk.index] += chunk.text
        last = chunk
    assert texts == [output.text for output in whole.outputs]
    assert len(set(texts)) == 3
    assert last.metrics.output_tokens == 45


def test_stop_strings(llm):
    (plain,) = llm.generate("hello", GREEDY)
    stop = plain.text[3:6]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=stop)
    (stopped,) = llm.generate("hello", params)
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert (stopped.finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert "".join(chunk.text for chunk in llm.stream("hello", params)) == stopped.text


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    text = "<user>hi<assistant>"
    answer = llm.chat(messages, GREEDY)
    assert answer.prompt_token_ids == tuple(llm.tokenizer.encode(text, add_special=False))
    assert "".join(chunk.text for chunk in llm.stream_chat(messages, GREEDY)) == answer.text


def test_on_finish_is_told_in_the_order_of_finishing(llm):
    lengths = [12, 3, 7]
    seen = []
    llm.generate(
        ["a", "b", "c"],
        [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths],
        on_finish=lambda output: seen.append(len(output.token_ids)),
    )
    assert seen == sorted(lengths)


def test_an_interrupt_leaves_nothing_running(llm):
    def interrupt(output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            ["a", "b"],
            [GREEDY, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)],
            on_finish=interrupt,
        )


def test_a_step_that_is_cut_off_corrupts_no_stream(llm, monkeypatch):
    """A page that siblings share may have been about to be copied: who would read the copy is lost."""
    ids, params = [5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    (whole,) = llm.generate([ids], params)
    llm.generate([[token] * 90 for token in range(8)], GREEDY)  # no page is fresh
    llm.engine.scheduler.forget_prefixes()
    stream, run = llm.stream(ids, params), llm.engine.runner.run
    next(stream)  # the siblings have a token each, and share all pages

    def interrupt(schedule):
        monkeypatch.setattr(llm.engine.runner, "run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("b", GREEDY)
    next(stream)  # told by the step before
    with pytest.raises(StrobeError, match="the request is lost"):
        next(stream)
    assert llm.generate([ids], params)[0].outputs == whole.outputs


def test_one_bad_prompt_runs_none(llm):
    steps = llm.engine.stats().steps
    with pytest.raises(RequestError, match=r"prompt 2 of 2: the prompt has .* context is 160"):
        llm.generate(["fine", "x" * 400], GREEDY)
    with pytest.raises(RequestError, match="context is 160"):
        llm.stream("x" * 400, GREEDY)
    assert llm.engine.stats().steps == steps


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([1, 2, 3], GREEDY, "list of numbers"),
        (["a", "b"], [GREEDY], "2 prompts and 1 sampling params"),
        (None, GREEDY, "prompts is a NoneType"),
        (b"abc", GREEDY, "prompts is a bytes"),
        ({"prompt": "a"}, GREEDY, "prompts is a dict"),
        (["a", None], GREEDY, "a prompt is a NoneType"),
        ([[1.5]], GREEDY, "no token id"),
        ([["a"]], GREEDY, "no token id"),
        ("a", {"max_tokens": 3}, "params is a dict"),
        (["a"], ["greedy"], "params is a str"),
    ],
)
def test_wrong_calls(llm, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)


@pytest.mark.parametrize("messages", ["hi", None, ["hi"], [{"content": "hi"}], {"role": "user"}, 3], ids=repr)
def test_what_is_no_conversation(llm, messages):
    with pytest.raises(RequestError, match=r'messages .*supported: a list of \{"role"'):
        llm.chat(messages)


def test_token_ids_may_be_an_array(llm):
    ids = [3, 1, 4]
    wanted = llm.generate([ids], GREEDY)[0].token_ids
    for array in (np.array(ids), torch.tensor(ids), tuple(ids)):
        (output,) = llm.generate([array], GREEDY)
        assert output.prompt_token_ids == (3, 1, 4)
        assert output.token_ids == wanted


def test_closed(folder):
    llm = LLM(folder, device="cpu", config=EngineConfig(kv_cache_pages=8))
    llm.close()
    llm.close()
    with pytest.raises(StrobeError, match="closed"):
        llm.generate("a")


@pytest.mark.parametrize("model", ["no/such/folder", 3, b"folder"], ids=repr)
def test_missing_model(model):
    with pytest.raises(CheckpointError, match=f"{model}.*no such file"):
        LLM(model)


def test_a_config_of_another_kind(folder):
    with pytest.raises(SettingsError, match="config is a dict; supported: EngineConfig"):
        LLM(folder, config={"max_num_seqs": 3})


def test_progress_is_told_to_the_last_byte(folder):
    told = []
    with LLM(
        folder, device="cpu", config=EngineConfig(kv_cache_pages=8), progress=lambda *at: told.append(at)
    ) as llm:
        total = sum(t.nbytes for t in tensors(llm.engine.model.weights))
        assert set(llm.startup) == {"checkpoint", "engine"}
        assert all(seconds > 0 for seconds in llm.startup.values())
    assert told == sorted(told)
    assert told[-1] == (total, total)
