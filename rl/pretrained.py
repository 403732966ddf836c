"""Where a run's initial model comes from: a folder, a hub id, a GGUF file inside a Python package, or from scratch.

Whatever the source, the result is a folder in Hugging Face format with tokenizer and chat template, that plain
transformers and plain vLLM load.
"""

import importlib.util
import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from rl.chat import ChatCodec
from rl.config import ModelConfig, ScratchModel
from rl.env import Demonstrator, World
from rl.task import TaskStream

SCRATCH_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools:"
    "{%- for tool in tools %} {{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }})"
    "{%- endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS_SIZE = 1000
_INITIAL_STD = 0.05
"""Weights of a narrow model are drawn wider than the usual 0.02: it learns to copy numbers in half the steps."""


class ModelNotFound(ValueError):
    """The configured model is not there; the text says where it was looked for."""


def prepare_model(config: ModelConfig, world: World, seed: int, folder: Path) -> Path:
    """The folder of the initial model; one made from scratch is written to `folder`.

    Raises ModelNotFound.
    """
    if config.scratch is not None:
        make_scratch(config.scratch, config.max_length, world, seed, folder)
        return folder
    return find_model(config.path or "")


def find_model(path: str) -> Path:
    """A local folder for a model path: see ModelConfig.path. Converts a packaged GGUF once and caches it."""
    if path.startswith("package://"):
        return _from_package(path.removeprefix("package://"))
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"{path} is a folder without config.json: not a model in Hugging Face format")
        return folder
    if path.startswith((".", "/")) or path.count("/") != 1:
        raise ModelNotFound(f"model {path!r}: no such folder, and not a hub id like organisation/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:
        # The hub client raises a dozen kinds of network and repository errors; all mean the same to a user.
        raise ModelNotFound(
            f"model {path!r}: no such folder, and the hub did not give it ({type(error).__name__}). "
            "Set model.path to a local folder"
        ) from error


def load_codec(model: ModelConfig) -> ChatCodec:
    """The tokenizer and chat template of a model that has a `path`. Raises ModelNotFound and TemplateError."""
    tokenizer = load_tokenizer(find_model(model.path or ""), trust_remote_code=model.trust_remote_code)
    return ChatCodec(tokenizer, keep_sampled_turns=model.keep_sampled_turns)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") == "TokenizersBackend":
        # The class without a model family's rules. Importing AutoTokenizer imports every family: six seconds more.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(path))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)


def cache_dir() -> Path:
    return Path(os.environ.get("REPERTORY_CACHE", Path.home() / ".cache" / "repertory"))


def _from_package(spec: str) -> Path:
    module, _, file = spec.partition("/")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModelNotFound(f"model package://{spec}: the Python package {module!r} is not installed")
    gguf = Path(found.origin).parent / file
    if not gguf.is_file():
        raise ModelNotFound(f"model package://{spec}: the package {module!r} holds no {file!r}")
    target = cache_dir() / "models" / gguf.stem
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):  # transformers below 5.19 leaves it there
        delattr(model.config, "quantization_config")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    if target.exists():
        shutil.rmtree(partial)  # another process was quicker
    else:
        partial.rename(target)
    return target


def make_scratch(config: ScratchModel, max_length: int, world: World, seed: int, folder: Path) -> None:
    """Write a randomly initialised Qwen3 and a tokenizer trained on demonstrations of the environment.

    Qwen3 for its normalised queries and keys: a model of a million parameters learns to copy numbers out of its context
    in about half the steps that a Llama of the same size takes.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _train_tokenizer(config.vocabulary, world, seed)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            head_dim=config.hidden // config.heads,
            max_position_embeddings=max(max_length, 512),
            tie_word_embeddings=True,
            initializer_range=_INITIAL_STD,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(vocabulary: int, world: World, seed: int) -> Any:
    """Byte-level BPE over rendered demonstrations; every digit is a token of its own, so that numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not isinstance(world.source, Demonstrator):
        raise ModelNotFound(
            "model.scratch trains its tokenizer on demonstrations, and this environment has none. Set model.path"
        )
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    wrapped.chat_template = SCRATCH_TEMPLATE
    texts = itertools.chain.from_iterable(_conversations(wrapped, world, seed))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:2],
        chat_template=SCRATCH_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _conversations(tokenizer: Any, world: World, seed: int) -> Any:
    """Rendered demonstrations, cut at the special tokens so that no merge runs across them."""
    import asyncio
    import re

    rng = random.Random(seed)
    stream = TaskStream(world.source, "train")
    assert isinstance(world.source, Demonstrator)
    for task in stream.next(_CORPUS_SIZE):
        opening = asyncio.run(world.env().reset(task))
        messages = list(opening.messages)
        for message in world.source.demonstrate(task, rng, guess=False):
            messages += [message, {"role": "tool", "content": task.answer}]
        text = tokenizer.apply_chat_template(messages, tools=list(opening.tools) or None, tokenize=False)
        yield [part for part in re.split(r"<\|\w+\|>", text) if part]
