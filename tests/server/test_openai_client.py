"""The API as the `openai` client sees it, which validates every answer strictly."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from strobe.checkpoints.chat import ChatTemplate
from strobe.engine import SamplingParams
from strobe.server.config import ServerConfig

from .conftest import LiveServer, events_of

MESSAGES = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(idle: LiveServer) -> OpenAI:
    return idle.client()


@pytest.fixture
def loose(idle: LiveServer) -> OpenAI:
    """For nulls that OpenAI's API sends too, and that its strict client refuses."""
    return idle.client(strict=False)


@pytest.fixture(scope="module")
def alone(llm_with):
    """The same model without a server, as the reference for texts."""
    return llm_with()


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "strobe-tiny"
    assert client.models.retrieve("strobe-tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


def test_a_completion_is_the_engines_own_text(client: OpenAI, alone) -> None:
    answer = client.completions.create(
        model="strobe-tiny", prompt="ROMEO:", max_tokens=24, temperature=0, seed=1
    )
    expected = alone.generate("ROMEO:", SamplingParams(max_tokens=24, temperature=0))[0]
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_max_tokens_defaults_to_16(client: OpenAI) -> None:
    answer = client.completions.create(model="strobe-tiny", prompt="O", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stop", [None, ["\n"], ["the", " a"]])
def test_streamed_text_is_the_whole_text(client: OpenAI, loose: OpenAI, stop) -> None:
    asked = {"model": "strobe-tiny", "prompt": "JULIET:\n", "max_tokens": 60, "seed": 7, "stop": stop}
    whole = client.completions.create(**asked)
    chunks = list(loose.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1
    if stop:
        assert not any(text in whole.choices[0].text for text in stop)


def test_lists_of_prompts_and_n(client: OpenAI, loose: OpenAI, alone) -> None:
    texts = ["ROMEO:", "Good night,"]
    ids = [alone.tokenizer.encode(text) for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(
            model="strobe-tiny", prompt=prompt, n=2, max_tokens=6, seed=3, echo=True
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        for choice in answer.choices:
            assert choice.text.startswith(texts[choice.index // 2])
        assert answer.choices[0].text != answer.choices[1].text
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        streamed = [""] * 4
        for chunk in loose.completions.create(
            model="strobe-tiny", prompt=prompt, n=2, max_tokens=6, seed=3, echo=True, stream=True
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in answer.choices]


def test_echo_is_the_text_that_was_given(idle: LiveServer) -> None:
    """Decoded from its ids it would lose what is written like a special token."""
    for prompt in ("<|turn|>Speak", ["<|turn|>Speak"], ["<|turn|>Speak", "O"]):
        answer = idle.post("/v1/completions", {"prompt": prompt, "max_tokens": 0, "echo": True}).json()
        assert answer["choices"][0]["text"] == "<|turn|>Speak"


def test_echo_scores_the_prompt(loose: OpenAI, alone) -> None:
    answer = loose.completions.create(
        model="strobe-tiny", prompt="But soft, what light", max_tokens=0, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    assert choice.text == "But soft, what light"
    assert answer.usage.completion_tokens == 0
    told = choice.logprobs
    ids = alone.tokenizer.encode("But soft, what light")
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids)
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    # the same by drawing: the logprob of token i is that of a completion of the prompt up to it
    for index in (3, len(ids) - 1):
        drawn = loose.completions.create(
            model="strobe-tiny",
            prompt=ids[:index],
            max_tokens=1,
            logprobs=0,
            logit_bias={str(ids[index]): 100},
        )
        assert drawn.choices[0].logprobs.token_logprobs[0] == pytest.approx(
            told.token_logprobs[index], abs=1e-3
        )
    for token, offset in zip(told.tokens[1:], told.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)


def test_logprobs_of_a_completion(client: OpenAI) -> None:
    choice = client.completions.create(
        model="strobe-tiny", prompt="ROMEO:", max_tokens=5, temperature=0, logprobs=3, stop=["zzz"]
    ).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5


def test_chat(client: OpenAI, alone) -> None:
    answer = client.chat.completions.create(
        model="strobe-tiny", messages=MESSAGES, temperature=0, max_completion_tokens=32
    )
    expected = alone.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=32))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.total_tokens == len(expected.prompt_token_ids) + len(expected.token_ids)


def test_chat_streams(client: OpenAI) -> None:
    asked = {
        "model": "strobe-tiny",
        "messages": MESSAGES,
        "seed": 4,
        "max_tokens": 40,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts, tokens, reasons = ["", ""], [[], []], [None, None]
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.content
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for index, choice in enumerate(whole.choices):
        assert tokens[index] == choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_content_parts_are_joined(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]
    asked = {"model": "strobe-tiny", "temperature": 0, "max_tokens": 12}
    split = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked)
    joined = client.chat.completions.create(messages=[{"role": "user", "content": "Who are\nyou?"}], **asked)
    assert split.choices[0].message == joined.choices[0].message


def test_a_chat_of_no_given_length_ends_where_its_logprobs_do(serve, monkeypatch) -> None:
    """A long context with many logprobs is more than one answer tells of: no fault of the client's."""
    monkeypatch.setattr("strobe.server.service.MAX_LOGPROB_ENTRIES", 90)
    chats = serve(ServerConfig()).client(strict=False).chat.completions
    asked = {"model": "strobe-tiny", "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    answer = chats.create(**asked, logprobs=True, top_logprobs=4, n=2)
    assert [len(choice.logprobs.content) for choice in answer.choices] == [9, 9]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        chats.create(**asked, logprobs=True, top_logprobs=4, n=2, max_tokens=10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_reason_is_one_of_the_clients_own(idle: LiveServer, alone, stream) -> None:
    """As vLLM has it: null where the model's own end token ended the answer."""
    (eos,) = alone.engine.model.config.eos_token_ids
    own = {"prompt": "O", "max_tokens": 9, "logit_bias": {str(eos): 100}, "temperature": 0, "stream": stream}
    for more, reason in (
        ({}, None),
        ({"stop_token_ids": [eos]}, eos),
        ({"logit_bias": {}, "stop": ["e", "a", "o", "\n"], "max_tokens": 99}, "text"),
    ):
        answer = idle.post("/v1/completions", own | more)
        choices = [event["choices"][0] for event in (events_of(answer) if stream else [answer.json()])]
        assert choices[-1]["finish_reason"] == "stop"
        told = choices[-1]["stop_reason"]
        assert told == reason if reason != "text" else told in more["stop"]


def test_seeds_repeat_and_differ(client: OpenAI) -> None:
    def text(seed: int) -> str:
        return (
            client.completions.create(model="strobe-tiny", prompt="O", max_tokens=20, seed=seed)
            .choices[0]
            .text
        )

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


def test_vllm_fields(client: OpenAI) -> None:
    def create(**extra):
        return client.completions.create(
            model="strobe-tiny", prompt="O", max_tokens=30, temperature=1, extra_body=extra
        )

    greedy = client.completions.create(model="strobe-tiny", prompt="O", max_tokens=30, temperature=0)
    assert create(top_k=1).choices[0].text == greedy.choices[0].text
    assert create(min_p=1.0).choices[0].text == greedy.choices[0].text
    assert create(ignore_eos=True).usage.completion_tokens == 30
    told = create(min_tokens=5, stop=[*"aeiou"], logit_bias={"1": -100})
    assert told.usage.completion_tokens >= 5
    assert told.choices[0].finish_reason == "stop"
    assert len(create(return_token_ids=True, ignore_eos=True).choices[0].token_ids) == 30


def test_many_async_clients_get_what_each_would_get_alone(idle: LiveServer) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{idle.url}/v1", api_key="none", max_retries=0) as client:

            async def text(seed: int) -> str:
                parts = []
                stream = await client.chat.completions.create(
                    model="strobe-tiny", messages=MESSAGES, seed=seed, max_tokens=25, stream=True
                )
                async for chunk in stream:
                    parts += [choice.delta.content or "" for choice in chunk.choices]
                return "".join(parts)

            together = await asyncio.gather(*(text(seed) for seed in range(24)))
            for seed in (0, 11, 23):
                assert together[seed] == await text(seed)
            assert len(set(together)) > 1

    asyncio.run(main())


def test_tokenize_and_back(idle: LiveServer, alone) -> None:
    text = "Wherefore art thou? Ünïcödé 🙂"
    told = idle.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == alone.tokenizer.encode(text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 1024
    assert idle.post("/detokenize", {"tokens": told["tokens"][1:]}).json() == {"prompt": text}
    chat = idle.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    rendered = alone.tokenizer.apply_chat_template(MESSAGES)
    assert chat == alone.tokenizer.encode(rendered, add_special=False)


def test_a_template_s_own_variables(idle: LiveServer, alone, monkeypatch) -> None:
    """As Qwen3's enable_thinking."""
    template = ChatTemplate(
        "{% if enable_thinking is defined and not enable_thinking %}calm{% else %}wild{% endif %}"
    )
    monkeypatch.setattr(idle.service.tokenizer, "chat_template", template)
    for given, text in (
        (None, "wild"),
        ({"enable_thinking": False}, "calm"),
        ({"self": 1, "function": 2, "args": [3, {"kwargs": 4}]}, "wild"),
    ):
        body = {"messages": MESSAGES, "chat_template_kwargs": given}
        expected = alone.tokenizer.encode(text, add_special=False)
        assert idle.post("/tokenize", body).json()["tokens"] == expected
        answer = idle.post("/v1/chat/completions", {**body, "max_tokens": 1, "return_token_ids": True}).json()
        assert answer["prompt_token_ids"] == expected


def test_version_health_and_metrics(idle: LiveServer) -> None:
    from strobe import __version__

    with idle.http() as http:
        assert http.get("/version").json() == {"version": __version__}
        assert http.get("/health").json() == {"status": "ok"}
        head = http.head("/health")
        assert (head.status_code, head.content) == (200, b"")
    before = (
        idle.metric("strobe:generation_tokens_total"),
        idle.metric("strobe:e2e_request_latency_seconds_count"),
    )
    idle.post("/v1/completions", {"prompt": "O", "max_tokens": 9, "ignore_eos": True})
    assert idle.metric("strobe:generation_tokens_total") == before[0] + 9
    assert idle.metric("strobe:e2e_request_latency_seconds_count") == before[1] + 1
    assert idle.metric("strobe:kv_cache_pages") == idle.engine.stats().pages
    assert idle.metric("strobe:event_loop_lag_seconds_count") > 0
    assert idle.metric("process_resident_memory_bytes") > 1 << 20
