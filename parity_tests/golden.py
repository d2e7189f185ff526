"""Write the small model's golden answers anew, after it was trained: `python -m parity_tests.golden`

A test holds the shipped file to them, so that a change of the engine that changes an answer is seen.
"""

import json
import sys
from pathlib import Path
from typing import Any

from glm_mlx.chat import encode_chat
from glm_mlx.engine import Engine
from glm_mlx.load import Loaded, load_model
from glm_mlx.sampling import SamplingParams
from glm_mlx.small import SMALL_MODEL
from glm_mlx.template import ChatTemplate

GOLDEN = Path(__file__).with_name("golden_answers.json")
GREEDY = SamplingParams(temperature=0)


def cases() -> list[dict[str, Any]]:
    """[{"prompt", "thinking", "answer" with special tokens spelled out}]"""
    return list(json.loads(GOLDEN.read_text()))


def prompt_ids(loaded: Loaded, text: str, thinking: bool) -> list[int]:
    template = ChatTemplate(loaded.gguf.metadata["tokenizer.chat_template"])
    return encode_chat(loaded.tokenizer, template, [{"role": "user", "content": text}], thinking=thinking)


def answer(loaded: Loaded, prompt: str, thinking: bool) -> str:
    ids = prompt_ids(loaded, prompt, thinking)
    tokens = [s.token for s in Engine(loaded.model).generate(ids, GREEDY, 200, loaded.tokenizer.stop_ids)]
    return loaded.tokenizer.decode(tokens, special=True)


def main() -> int:
    loaded = load_model(SMALL_MODEL)
    new = [case | {"answer": answer(loaded, case["prompt"], case["thinking"])} for case in cases()]
    GOLDEN.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
