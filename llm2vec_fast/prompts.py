"""What is put around a text before the model sees it, and where in the result the text begins.

Some published checkpoints were trained with a chat turn around each text, and "eos_token" pooling reads the token that
ends the text. Both are tables here, looked up once when a model is loaded. An instruction goes between the two:

    opening + instruction + " " + text + closing

Everything before the text is the prompt; pooling leaves its tokens out. Where the text begins is a character position
in the joined string: a prompt tokenised alone may have other tokens than the same prompt followed by a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

# Checkpoints trained with a chat turn around each text, by the name their configuration carries.
CHAT_TURNS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistralai/Mistral-7B-Instruct-v0.2": ("[INST] ", " [/INST]"),
    "meta-llama/Llama-2-7b-chat-hf": ("[INST] ", " [/INST]"),
    "google/gemma-2-9b-it": ("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "Qwen/Qwen2-1.5B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
    "Qwen/Qwen2-7B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
}
# A turn that ends in a token of its own needs no further end mark.
_ENDED_BY_TURN = {"meta-llama/Meta-Llama-3-8B-Instruct"}
# End marks for "eos_token" pooling: by checkpoint, else by model type. Written into the text, as in training.
_END_MARKS = {
    "meta-llama/Meta-Llama-3-8B": "<|end_of_text|>",
    "llama": " </s>",
    "mistral": " </s>",
    "gemma": "<eos>",
    "qwen2": "<|endoftext|>",
}
# Checkpoints whose name decides what goes around a text: a saved copy has to keep it.
CHECKPOINTS = {*CHAT_TURNS, *(name for name in _END_MARKS if "/" in name)}


@dataclass(frozen=True)
class Prompted:
    """A text with its prompt: ``joined``, in which the text begins at character ``boundary``."""

    joined: str
    boundary: int


@dataclass(frozen=True)
class Template:
    """What goes before and after every text of one model."""

    opening: str = ""
    closing: str = ""

    def join(self, instruction: str, text: str) -> Prompted:
        """Put the template and an instruction ("" for none) around a text."""
        instruction = instruction.strip()
        prompt = self.opening + (f"{instruction} " if instruction else "")
        body = text.rstrip() if self.closing else text
        return Prompted(f"{prompt}{body}{self.closing}", len(prompt))


def find_template(
    checkpoint: str, model_type: str, pooling_mode: str, end_token: str | None, knows: Callable[[str], bool]
) -> Template:
    """The template of a model.

    Args:
        checkpoint: the name the checkpoint was published under, such as "meta-llama/Meta-Llama-3-8B-Instruct".
        model_type: its configuration's model type, such as "llama".
        pooling_mode: with "eos_token" each text is closed by an end mark.
        end_token: the tokenizer's end token; the end mark where the table has none that the tokenizer knows.
        knows: whether a string is one token of the tokenizer.
    """
    opening, closing = CHAT_TURNS.get(checkpoint, ("", ""))
    if pooling_mode == "eos_token" and checkpoint not in _ENDED_BY_TURN:
        mark = _END_MARKS.get(checkpoint) or _END_MARKS.get(model_type, "")
        # Models of type llama with another tokenizer would read " </s>" as four pieces of punctuation.
        closing += mark if mark and knows(mark.strip()) else (end_token or "")
    return Template(opening, closing)


def as_pairs(sentences: Sequence[str | Sequence[str]], instruction: str | None = None) -> list[tuple[str, str]]:
    """Strings and [instruction, text] pairs as (instruction, text) pairs; ``instruction`` goes with every string.

    Raises:
        TypeError: an item is neither a string nor a pair of strings; the message names its position. Or they have no
            order, or are the keys of a mapping.
        ValueError: ``instruction`` was given and an item brings its own.
    """
    if isinstance(sentences, (Mapping, Set)):
        raise TypeError(f"sentences is a {type(sentences).__name__}, not a list of texts: pass them in an order")
    pairs = []
    for position, item in enumerate(sentences):
        if isinstance(item, str):
            pairs.append((instruction or "", item))
            continue
        if not (isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item)):
            raise TypeError(
                f"sentences[{position}] is {_shown(item)}: pass a string or a pair of strings [instruction, text]"
            )
        if instruction:
            raise ValueError(
                f"sentences[{position}] brings its own instruction: drop the argument instruction=, or pass plain texts"
            )
        pairs.append((item[0], item[1]))
    return pairs


def _shown(item: object) -> str:
    shown = repr(item)
    return shown if len(shown) <= 60 else f"a {type(item).__name__}"
