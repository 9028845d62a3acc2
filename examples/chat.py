"""An endless chat in constant memory: the stream keeps `--budget` tokens however long you talk. End with Ctrl-D.

Turns are written in ChatML, which SmolLM2 and Qwen know; needs: pip install 'kvsieve[demo]' for a GGUF file.
"""

import argparse

import kvsieve
from kvsieve.evals.models import MODEL_HELP, load_model
from kvsieve.view.typist import held, print_while_generating


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--budget", type=int, default=1024, help="tokens that stay in memory")
    parser.add_argument("--decay", type=float, default=0.95, help="how fast old surprises fade, per turn")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    policy = kvsieve.SirLLM(budget=arguments.budget, decay=arguments.decay)
    with kvsieve.stream(model, policy) as stream:
        while True:
            try:
                said = input("you> ")
            except (EOFError, KeyboardInterrupt):
                break
            turn = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(turn, return_tensors="pt", add_special_tokens=False)["input_ids"]
            print_while_generating(stream, tokenizer, ids, max_new_tokens=200)
            stream.end_turn()
            stats = stream.stats()
            print(f"[{stats.seen:,} tokens seen, {stats.resident:,} kept, {held(stats)}]")


if __name__ == "__main__":
    main()
