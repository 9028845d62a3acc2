"""What recording costs, and how fast the page of `kvsieve view` is, at 50,000 tokens.

    python benches/view.py                  # needs Chromium or Chrome: scripts/browser.sh

A random model of 30 layers of 3 key-value heads reads a text in pieces, and then token by token. Recording: CPU milliseconds a step
with and without, runs interleaved, medians; the file; the page. The page, in a headless browser of 1440 x 900 without a GPU: CPU
milliseconds of the main thread, from the browser's own trace: of the slider's handler at the median and the 95th percentile, and of
all that a step makes it do until the picture is there, at the mean. The slider is dragged by 0.2 % of the steps at a time, and
thrown anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import kvsieve  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from browser import Browser, Tab  # noqa: E402
from kvsieve.files.recording_file import read  # noqa: E402
from kvsieve.view.page import page  # noqa: E402

POLICIES = (
    "streamingllm(1024)",
    "sirllm(1024)",
    "snapkv(1024)",
    "infllm(window=512, blocks=8, block=64, sinks=64, query_block=512)",
    "hip(512)",
)
_TASK = "ThreadControllerImpl::RunTask"
"""What the browser calls one turn of a thread, rendering among them."""

WORDS = ("the", " sea", " is", " history", ",", " of", " people", " who", " crossed", " it", ".\n")

MOVES = {"drag": "Math.round(max * (.3 + .002 * i))", "throw": "Math.round(max * ((37 * i) % 60) / 59)"}
MOVE = """(async () => {
  const time = document.getElementById('time'), max = +time.max;
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  for (let i = 0; i < 60; i++) { await frame(); time.value = %s; time.dispatchEvent(new Event('input')); await frame(); }
})()"""


class Text:
    """Stands for a tokenizer."""

    def decode(self, ids: Any) -> str:
        return "".join(WORDS[int(i) % len(WORDS)] for i in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--single", type=int, default=300, help="how many of them come one by one")
    parser.add_argument("--only", default="", help="policies whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {
        "num_hidden_layers": 30,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 1 << 17,
    }
    model = tiny.fresh(**shape)
    ids = tiny.ids(1, options.tokens)
    print("| policy | steps | CPU ms a step (recorded / not) | a single token (recorded / not) | file | page | drag | throw |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        for text in POLICIES:
            if options.only in text:
                told = recording(model, ids, kvsieve.methods.parse(text), Path(folder) / "r.json", options.single)
                (Path(folder) / "r.html").write_text(page(read(Path(folder) / "r.json")), encoding="utf-8")
                told += [f"{(Path(folder) / name).stat().st_size / 1e6:.1f} MB" for name in ("r.json", "r.html")]
                told += moving(browser, Path(folder) / "r.html")
                print(f"| `{text}` | {' | '.join(told)} |", flush=True)


def recording(model: Any, ids: torch.Tensor, policy: Any, path: Path, single: int) -> list[str]:
    """Two streams read the same text, side by side, one of which is recorded."""
    pieces, ones = {True: [], False: []}, {True: [], False: []}  # type: ignore[var-annotated]
    edges = [*range(0, ids.shape[1] - single, 512), *range(ids.shape[1] - single, ids.shape[1] + 1)]
    with kvsieve.stream(model, policy) as plain, kvsieve.stream(model, policy) as watched, watched.record(path, Text()):
        for lo, hi in itertools.pairwise(edges):
            for recorded, stream in ((False, plain), (True, watched)):
                start = time.process_time()
                stream.feed(ids[:, lo:hi], chunk=hi - lo)
                (ones if hi - lo == 1 else pieces)[recorded].append(1000 * (time.process_time() - start))
    told = [f"{len(edges) - 1:,}"]
    return told + [f"{statistics.median(each[True]):.1f} / {statistics.median(each[False]):.1f}" for each in (pieces, ones)]


def moving(browser: Browser, path: Path) -> list[str]:
    """For each way to move the slider the handler's two numbers, and that of the whole step."""
    tab = browser.open(path.as_uri())
    tab.size(1440, 900)
    tab.wait("document.documentElement.dataset.ready === 'yes'")
    found = []
    for move in MOVES.values():
        events = traced(tab, MOVE % move)
        inputs = [event for event in events if event.get("args", {}).get("data", {}).get("type") == "input"]
        thread = (inputs[0]["pid"], inputs[0]["tid"])
        handler = sorted(event["tdur"] / 1000 for event in inputs)
        whole = sum(event.get("tdur", 0) for event in events if event["name"] == _TASK and (event["pid"], event["tid"]) == thread)
        found.append(f"{handler[30]:.1f}, {handler[56]:.1f}; {whole / 1000 / 60:.0f}")
    assert not tab.said
    return found


def traced(tab: Tab, code: str) -> list[dict[str, Any]]:
    """What the browser did while the page ran ``code``."""
    events: list[dict[str, Any]] = []
    tab.listen("Tracing.dataCollected", lambda params: events.extend(params["value"]))
    done: list[object] = []
    tab.listen("Tracing.tracingComplete", done.append)
    tab.call("Tracing.start", transferMode="ReportEvents", traceConfig={"includedCategories": ["toplevel", "devtools.timeline"]})
    tab.js(code)
    tab.call("Tracing.end")
    while not done:
        tab.js("1")
    return events


if __name__ == "__main__":
    main()
