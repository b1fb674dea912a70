"""How long a word takes to its lips in a real browser, whether sound and picture stay together, what a swap and an interruption look like: `python -m benchmarks.live`.

Starts `serve.py --listen --numbers`, opens its page in a headless Chromium (pip install playwright; a Chromium from the system), and
pushes utterances, each whole and at once, into the stream that listens. Every picture carries its number, which the page reads back when the picture
is shown (`requestVideoFrameCallback`); the server says which number was the first with the utterance's sound. So no clock is shared but the browser's own.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks import live_page


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def get(address: str):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def wait_for_server(address: str, process: subprocess.Popen, seconds: float = 180.0) -> None:
    """Raises RuntimeError where it does not come up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            get(f"{address}/health")
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the server at {address} did not come up")


def percentiles(values: list[float]) -> dict[str, float]:
    kept = np.asarray(values, float)
    return {"n": len(kept), **{f"p{q}": round(float(np.percentile(kept, q)), 1) for q in (5, 50, 95)}} if len(kept) else {"n": 0}


def fill(address: str) -> int:
    """Opens sessions beside the page's, each with a viewer who throws everything away, until one is refused. Returns how many there are then."""

    def watch(path: str) -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(path) as stream:
            while stream.read(65_536):
                pass

    count = 1
    while True:
        asked = urllib.request.Request(f"{address}/api/sessions", b"{}", {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                session = json.load(answer)["id"]
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503):  # too many of one client, too many for the machine
                raise
            return count
        threading.Thread(target=watch, args=(f"{address}/api/sessions/{session}/stream.ts",), daemon=True).start()
        count += 1
        time.sleep(10.0)  # steps take longer now, which is what the next one is admitted by


def measure(page, address: str, server: int, options: argparse.Namespace) -> dict:
    """Latency and offset of utterances, in ms, then interruptions and swaps; and the server's memory beside them.

    Args:
      server: its process.
    """
    import psutil

    rng = np.random.default_rng(0)
    page.wait_for_function("document.getElementById('state').dataset.state === 'live'", timeout=30_000)
    page.evaluate(live_page.READ)
    page.evaluate(live_page.LISTEN)
    page.wait_for_function("shownAt.size > 50", timeout=30_000)
    sessions = fill(address) if options.fill else 1
    session = page.evaluate("pikastream.session")
    path = f"{address}/api/sessions/{session}"
    rows: list[dict] = []
    began = time.monotonic()
    while len(rows) < options.utterances if options.minutes is None else time.monotonic() - began < 60 * options.minutes:
        time.sleep(options.pause + rng.uniform(0, 0.5))
        pushed = page.evaluate(live_page.PUSH, [session, options.seconds])
        time.sleep(options.seconds + 1.5)
        utterance = get(path)["utterances"][-1]
        first = utterance["first"]
        shown = page.evaluate("(first) => [...shownAt].filter(([n]) => n >= first && n < first + 3).sort((a, b) => a[0] - b[0])[0] ?? null", first)
        heard = page.evaluate("heard[0] ?? null")
        row = {"minute": (time.monotonic() - began) / 60, "mb": psutil.Process(server).memory_info().rss / 1e6}
        if shown:
            row["latency"] = shown[1] - pushed
            row |= utterance["ms"]
            if heard is not None:
                row["offset"] = heard - (shown[1] - 40 * (shown[0] - first))
                row["offset_by_browser"] = page.evaluate(live_page.STATS)["offset"]
        rows.append(row)
        page.evaluate("() => { const newest = Math.max(...shownAt.keys()); for (const n of shownAt.keys()) if (n < newest - 500) shownAt.delete(n); }")
    found = {"sessions": sessions} | _summary(rows) | ({} if options.minutes is None else {"by_5_minutes": _by_time(rows)})
    found["stages_ms"] = _stages(rows, get(path)["figures"], page.evaluate(live_page.STATS))
    found["interrupt_to_silence_ms"] = percentiles([_interrupt(page, session) for _ in range(options.interruptions)])
    found["swaps"] = _swaps(page, path, session, options.swaps)
    return found | {"session": get(path)["figures"]}


def _stages(rows: list[dict], figures: dict, stats: dict) -> dict:
    """Where the latency goes, on the mean. What is left when all that the server and the browser tell of themselves is taken away is the network and the screen."""
    shown = [row for row in rows if "latency" in row]
    mean = {name: float(np.mean([row[name] for row in shown])) for name in ("wait_for_chunk", "model", "reserve", "latency")}
    known = {name: mean[name] for name in ("wait_for_chunk", "model", "reserve")}
    known |= {"encoder": figures["encode_ms"], "browser_buffer": stats["buffer"], "browser_decoder": stats["decode"]}
    known["network_and_screen"] = mean["latency"] - sum(known.values())
    return {name: round(value, 1) for name, value in known.items()} | {"sum": round(mean["latency"], 1)}


def _interrupt(page, session: str) -> float:
    """Time from the request to the last sound that is heard, in mid-speech."""
    page.evaluate(live_page.PUSH, [session, 4.0])
    page.wait_for_function("heard.length > 200", timeout=10_000)
    asked = page.evaluate(live_page.INTERRUPT, session)
    time.sleep(1.5)
    return page.evaluate("heard.at(-1)") - asked


def _swaps(page, path: str, session: str, count: int) -> dict:
    """Faces changed while the avatar speaks: when the new one is seen, how far its largest step goes, and whether a frame was late.

    A picture shows the new face when it is nearer to what is shown two seconds later than to what was shown before the request.
    """
    names = page.evaluate("fetch('/api/avatars').then((answer) => answer.json())")
    seen, landed, step, usual = [], [], [], []
    late = {True: 0, False: 0}  # with a swap, and in as long without: looking at every picture takes time of the same cores
    for turn, swaps in itertools.product(range(count), (False, True)):
        page.evaluate(live_page.PUSH, [session, 4.0])
        page.evaluate("() => { window.pictures = []; }")
        time.sleep(1.0)
        count_before = get(path)["figures"]["late_frames"]
        if swaps:
            asked, answered = page.evaluate(live_page.SWAP, [session, names[(turn + 1) % len(names)]["name"]])
        time.sleep(2.5)
        late[swaps] += get(path)["figures"]["late_frames"] - count_before
        # Handing over so many pixels takes both cores for a moment: it comes after the frames are counted, and they get time to recover.
        found = page.evaluate("() => { const found = pictures; window.pictures = null; return found; }")
        time.sleep(2.5)
        if not swaps:
            continue
        moments, pixels = zip(*found, strict=True)
        moments, pixels = np.array(moments), np.array(pixels, np.float32)
        before, after = pixels[moments < asked][-10:].mean(0), pixels[-10:].mean(0)
        distances = [np.abs(pixels - face).mean(1) for face in (before, after)]
        new = (distances[1] < distances[0]) & (moments > asked)
        seen.append(float(moments[new][0] - asked) if new.any() else float("nan"))
        landed.append(answered - asked)
        steps = np.abs(np.diff(pixels, axis=0)).mean(1)
        step.append(float(steps[moments[1:] > asked].max() / np.abs(after - before).mean()))
        usual.append(float(np.percentile(steps[moments[1:] < asked], 95) / np.abs(after - before).mean()))
    return {
        "seen_after_ms": percentiles(seen),
        "answered_after_ms": percentiles(landed),
        "late_frames": late[True],
        "late_frames_in_as_long_without": late[False],
        "largest_step_of_the_difference": round(max(step), 2) if step else None,
        "usual_step_of_the_difference": round(float(np.mean(usual)), 2) if usual else None,
    }


def _summary(rows: list[dict]) -> dict:
    return {
        "first_lips_ms": percentiles([row["latency"] for row in rows if "latency" in row]),
        "sound_after_picture_ms": percentiles([row["offset"] for row in rows if "offset" in row]),
        "sound_after_picture_by_the_browsers_own_account_ms": percentiles([row["offset_by_browser"] for row in rows if "offset" in row]),
        "server_mb": round(max(row["mb"] for row in rows), 1),
    }


def _by_time(rows: list[dict]) -> list[dict]:
    """A summary of every five minutes."""
    last = int(rows[-1]["minute"] // 5)
    groups = [[row for row in rows if row["minute"] // 5 == five] for five in range(last + 1)]
    return [{"minute": 5 * five} | _summary(group) for five, group in enumerate(groups) if group]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__.split("\n")[0])
    parser.add_argument("--utterances", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="go on for so long instead of --utterances, and say how every five minutes went")
    parser.add_argument("--seconds", type=float, default=0.6, help="of an utterance")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between them, and up to half a second more")
    parser.add_argument("--interruptions", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=6)
    parser.add_argument("--fill", action="store_true", help="as many sessions as are admitted, beside the one that is measured")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="take a picture of the page")
    parser.add_argument("serve", nargs="*", help="more options of serve.py, after --")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("benchmarks.live: no chromium is installed", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    address = f"http://127.0.0.1:{free_port()}"
    server = subprocess.Popen([sys.executable, "serve.py", "--listen", address.removeprefix("http://"), "--numbers", *options.serve])
    try:
        wait_for_server(address, server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium,
                args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
            )
            page = browser.new_page(viewport={"width": 1200, "height": 860}, bypass_csp=True)
            page.on("console", lambda message: print(f"page: {message.text}", file=sys.stderr))
            page.goto(address)
            page.wait_for_selector("#avatars button")
            page.click("#connect")
            found = measure(page, address, server.pid, options)
            if options.picture:
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=str(options.picture))
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
