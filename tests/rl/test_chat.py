"""Concatenated turns are the template's own rendering, or the template is refused by name."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rl.chat import ChatCodec, TemplateError, parse_calls
from rl.envs.calculator import TOOL
from rl.pretrained import SCRATCH_TEMPLATE

# SmolLM2-Instruct's own text, system default included.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama3(content: str) -> str:
    return (
        "{{- '<|begin_of_text|>' }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + " + content + " + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    )


def chatml(assistant: str, end: str = "<|im_end|>") -> str:
    """ChatML whose assistant turns are written by the expression `assistant`."""
    return (
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
        "{%- if m.role == 'assistant' %}{{ '\n' }}{{ "
        + assistant
        + " }}{% else %}{{ '\n' + m.content }}{% endif %}"
        + end
        + "\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# After Qwen3: earlier turns lose their reasoning; consecutive tool results share a user turn.
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{%- endif %}{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)

TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama3": llama3("message['content']"),
    "llama3-trim": llama3("message['content'] | trim"),
    "qwen3": QWEN3,
    "strips": chatml("m.content.strip()"),
    "scratch": SCRATCH_TEMPLATE,
}
REFUSED = {
    "llama3-trim": "strips whitespace from earlier assistant turns",
    "strips": "strips whitespace from earlier assistant turns",
    "qwen3": "strips reasoning from earlier assistant turns",
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = ["system user assistant tool\n\n You are a helpful assistant trained by Hugging Face\n", "<think>two</think>"]


def tokenizer_for(template: str, special=SPECIAL, named=SPECIAL) -> PreTrainedTokenizerFast:
    """A small byte-level BPE; `special` are kept whole by it, `named` are also listed as special by the tokenizer."""
    bpe = Tokenizer(models.BPE())
    # Llama-3's way of cutting text into words, less its letter classes: a run of line breaks is one word.
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS * 20, trainer)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=list(named),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make(name: str, **kwargs) -> ChatCodec:
    return ChatCodec(tokenizer_for(TEMPLATES[name]), **kwargs)


OPENINGS = {
    "user": [{"role": "user", "content": "What is 12+3?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 3, please"}],
}
TURNS = [
    ("I look it up", [{"role": "tool", "content": "15"}]),
    ("ein Wort: größer — 大きい 🙂", [{"role": "tool", "content": "no tool"}, {"role": "tool", "content": "two"}]),
    ('<tool_call>{"name": "x"}</tool_call>', [{"role": "user", "content": "go on\n\nplease"}]),
    ("15", [{"role": "user", "content": "sure?"}]),
]


def play(codec: ChatCodec, opening, turns=TURNS, tools=()):
    """The concatenated ids of a conversation up to the last assistant turn's end, and its messages."""
    ids, messages = codec.prompt(opening, tools), list(opening)
    for i, (said, seen) in enumerate(turns):
        reply = {"role": "assistant", "content": said}
        last = i == len(turns) - 1
        ids += codec.reply(reply) + ([] if last else codec.observation(seen))
        messages += [reply, *([] if last else seen)]
    return ids, messages


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_concatenated_turns_are_the_templates_own_rendering(name, opening):
    codec = make(name, keep_sampled_turns=name in REFUSED)
    ids, messages = play(codec, OPENINGS[opening])
    own = codec.messages(messages)
    # The template writes its glue after the last turn's end too; no model sees that.
    assert own[: len(ids)] == ids
    assert codec.text(own[len(ids) :], special=True).strip() == ""
    assert codec.text(ids, special=True).count("ein Wort: größer — 大きい 🙂") == 1


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_that_rendering_is_what_transformers_writes(name):
    """The same again without the codec's help on the other side: plain `apply_chat_template`, plain roles."""
    codec, tokenizer = make(name), tokenizer_for(TEMPLATES[name])
    turns = [(said, [{"role": "user", "content": "and then?"}]) for said, _ in TURNS]
    ids, messages = play(codec, OPENINGS["user"], turns)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith(tokenizer.decode(ids))
    assert tokenizer.encode(text, add_special_tokens=False)[: len(ids)] == ids


def test_smollm2_keeps_its_default_system_message_once():
    text = make("smollm2").text(play(make("smollm2"), OPENINGS["user"])[0], special=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.count("<|im_start|>system") == 1


def test_native_tools_and_structured_calls_in_the_scratch_template(codec):
    """The environment's demonstrations hold calls as structures: sampled and rendered they are the same text."""
    call = {"name": "calculator", "arguments": {"a": 17, "op": "+", "b": 4}}
    messages = [{"role": "user", "content": "17+4-9"}]
    ids = codec.prompt(messages, [TOOL])
    assert codec.text(ids, special=True).startswith("<|im_start|>system\nTools: calculator(a, op, b)<|im_end|>")
    for _ in range(3):
        reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        seen = [{"role": "tool", "content": "21"}]
        ids += codec.reply(reply) + codec.observation(seen)
        messages += [reply, *seen]
    ids += codec.reply({"role": "assistant", "content": "12"})
    own = codec.messages([*messages, {"role": "assistant", "content": "12"}], [TOOL])
    assert codec.text(own, special=True) == codec.text(ids, special=True) + "\n"
    assert codec.action(codec.reply(messages[1])).tool_calls[0].arguments == call["arguments"]


def test_structured_calls_have_the_ids_of_the_templates_text():
    codec = make("scratch")
    call = {"name": "calculator", "arguments": {"a": 17, "op": "+", "b": -4, "text": 'ü "x"'}}
    reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}] * 2}
    messages = [{"role": "user", "content": "17+4"}, reply, {"role": "tool", "content": "13"}, reply]
    said = codec.reply(reply)
    ids = codec.prompt(messages[:1], [TOOL]) + said + codec.observation(messages[2:3]) + said
    assert codec.messages(messages, [TOOL])[: len(ids)] == ids
    assert len(codec.action(codec.reply(reply)).tool_calls) == 2


def test_tools_go_into_the_system_message_where_the_template_knows_none():
    codec = make("smollm2")
    text = codec.text(codec.prompt(OPENINGS["system"], [TOOL]), special=True)
    assert text.count("<|im_start|>system") == 1
    assert "Be brief." in text
    assert '"name": "calculator"' in text
    assert "<tool_call>" in text


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_edits_earlier_turns_is_refused_by_what_it_does(name):
    with pytest.raises(TemplateError, match=REFUSED[name]) as refusal:
        make(name)
    assert "keep_sampled_turns" in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (chatml("m.content.split('</think>')[-1] | trim"), "strips reasoning"),
        (chatml("m.content.rstrip()"), "strips whitespace"),
        (chatml("m.content.strip('\n')"), "strips whitespace"),
        (chatml("m.content.lstrip(' ')"), "strips whitespace"),
        (chatml("m.content | replace(' ', '_')"), "rewrites earlier assistant turns"),
        (chatml("(m.content if loop.last else m.content[:3])"), "rewrites earlier assistant turns"),
        (chatml("m.content", end="{{ '<|im_end|>' if loop.length < 4 else '' }}"), "rewrites earlier"),
        (chatml("m.content", end="\n### End"), "not one special token"),
        (chatml("m.content | upper"), "rewrites"),
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        (None, "no chat template"),
    ],
    ids=["reasoning", "rstrip", "newlines", "blanks", "replace", "cut", "end", "no-special", "upper", "raises", "none"],
)
def test_refusals_name_the_reason(template, says):
    with pytest.raises(TemplateError, match=says):
        ChatCodec(tokenizer_for(template))


def test_no_setting_accepts_a_template_that_rewrites_turns():
    with pytest.raises(TemplateError, match="rewrites"):
        ChatCodec(tokenizer_for(chatml("m.content | replace(' ', '_')")), keep_sampled_turns=True)


@pytest.mark.parametrize("name", REFUSED)
def test_kept_turns_stay_as_they_were_sampled(name):
    """Reasoning and blanks of an earlier turn are in the context to the last token, where the template drops them."""
    codec = make(name, keep_sampled_turns=True)
    said = " <think>two</think>\n\n one "
    ids, _ = play(codec, OPENINGS["user"], [(said, [{"role": "user", "content": "and?"}]), ("done", [])])
    assert said in codec.text(ids, special=True)
    sampled = codec.reply({"role": "assistant", "content": said})
    start = len(codec.prompt(OPENINGS["user"]))
    assert ids[start : start + len(sampled)] == sampled


def test_an_end_of_turn_that_only_the_vocabulary_calls_special_is_accepted():
    """Gemma-3 and Phi-3 name no extra special tokens: their end of turn is special as an added token only."""
    codec = ChatCodec(tokenizer_for(SMOLLM2, named=()))
    assert codec.text([codec.end_of_turn], special=True) == "<|im_end|>"


def test_an_empty_observation_still_gives_the_model_the_word(codec):
    """Two assistant messages in a row, or an environment with nothing to say: the next turn needs its header."""
    assert codec.text(codec.observation([]), special=True) == "\n<|im_start|>assistant\n"


# -- parsing ----------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "names", "error"),
    [
        ("no call at all, 1 < 2", [], None),
        ("", [], None),
        (CALL, ["f"], None),
        (f"I think\n{CALL} and then\n{CALL}", ["f", "f"], None),
        ('<tool_call>\n{"name": "g"}\n</tool_call>', ["g"], None),  # no arguments: an empty object
        ("<tool_call>{'name': 'f'}</tool_call>", [], "not JSON"),
        ("<tool_call></tool_call>", [], "not JSON"),
        ("<tool_call>" + "[" * 200_000 + "</tool_call>", [], "not JSON"),  # RecursionError inside json
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", [], "not JSON"),
        (CALL + "<tool_call>", [], "unbalanced"),
        (CALL + "</tool_call>", [], "unbalanced"),
        (f"<tool_call>{CALL}</tool_call>", [], "unbalanced"),
        ("</tool_call>{}<tool_call>", [], "unbalanced"),
        ("<tool_call>" * 50_000, [], "unbalanced"),  # 100 s for a search that is not linear
        ("</tool_call>" * 50_000 + "<tool_call>" * 50_000, [], "unbalanced"),
        ("<tool_call>[1]</tool_call>", [], "no name"),
        ('<tool_call>{"name": 3}</tool_call>', [], "no name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [], "not an object"),
        ('<tool_call>{"name": "f", "arguments": "a"}</tool_call>', [], "not an object"),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [], "not an object"),
        (CALL + '<tool_call>{"name": 3}</tool_call>', [], "no name"),  # one bad call spoils the turn
    ],
)
def test_parse_calls(text, names, error):
    calls, found = parse_calls(text)
    assert [c.name for c in calls] == names
    assert (found is None) if error is None else (error in found)


def test_an_action_is_the_turn_without_its_end(codec):
    ids = codec.reply({"role": "assistant", "content": "42"})
    action = codec.action(ids)
    assert (action.text, action.tool_calls, action.error, action.truncated) == ("42", (), None, False)
    assert list(action.token_ids) == ids
    cut = codec.action(ids[:-1], truncated=True)
    assert (cut.text, cut.truncated) == ("42", True)
    assert codec.action([]).text == ""
