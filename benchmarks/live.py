"""How long a word takes to its lips in a real browser, and whether sound and picture stay together: `python -m benchmarks.live`.

Starts `serve.py --listen --numbers`, opens its page in a headless Chromium (pip install playwright; a Chromium from the system), and
pushes utterances, each whole and at once, into the stream that listens. Every picture carries its number, which the page reads back when the picture
is shown (`requestVideoFrameCallback`); the server says which number was the first with the utterance's sound. So no clock is shared but the browser's own.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

READ = """() => {
  window.shownAt = new Map(); window.heard = []; window.gaps = [];
  const video = document.getElementById("video"), canvas = document.createElement("canvas");
  canvas.width = 256; canvas.height = 8;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const look = (now) => {
    pen.drawImage(video, 0, 0, 256, 8, 0, 0, 256, 8);
    const row = pen.getImageData(0, 4, 256, 1).data, bit = (i) => row[4 * (8 * i + 4)] > 127;
    if (bit(0) && !bit(1)) { let n = 0; for (let i = 2; i < 26; i++) n = 2 * n + bit(i); if (!shownAt.has(n)) shownAt.set(n, now); }
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
}"""
LISTEN = """async () => {
  const video = document.getElementById("video"), context = new AudioContext({ sampleRate: 48000 });
  await context.resume();
  const code = `registerProcessor("level", class extends AudioWorkletProcessor { process(inputs) {
    const x = inputs[0][0]; if (x) { let s = 0; for (const v of x) s += v * v; this.port.postMessage([currentTime, Math.sqrt(s / x.length)]); } return true; } });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const node = new AudioWorkletNode(context, "level");
  node.port.onmessage = ({ data: [time, level] }) => {
    const at = performance.now();
    if (level > 0.05) heard.push(at);
  };
  context.createMediaStreamSource(video.srcObject).connect(node);
  window.context = context;
}"""
PUSH = """async ([id, seconds]) => {
  const socket = new WebSocket(`ws://${location.host}/api/sessions/${id}/audio?rate=16000`);
  await new Promise((resolve) => { socket.onopen = resolve; });
  const sound = new Int16Array(16000 * seconds).map((_, i) => 12000 * Math.sin(i * 2 * Math.PI * 220 / 16000));
  window.heard = [];
  const at = performance.now();
  socket.send(sound); socket.send("end");
  setTimeout(() => socket.close(), 5000);
  return at;
}"""


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


def measure(page, address: str, server: int, minutes: float | None, count: int, seconds: float, pause: float) -> dict:
    """Latency and offset of `count` utterances, in ms, or of as many as fit into so many minutes; and the server's memory beside them.

    Args:
      server: its process.
    """
    import psutil

    rng = np.random.default_rng(0)
    page.wait_for_function("document.getElementById('state').dataset.state === 'live'", timeout=30_000)
    page.evaluate(READ)
    page.evaluate(LISTEN)
    page.wait_for_function("shownAt.size > 50", timeout=30_000)
    session = page.evaluate("pikastream.session")
    rows: list[dict] = []
    began = time.monotonic()
    while len(rows) < count if minutes is None else time.monotonic() - began < 60 * minutes:
        time.sleep(pause + rng.uniform(0, 0.5))
        pushed = page.evaluate(PUSH, [session, seconds])
        time.sleep(seconds + 1.5)
        first = get(f"{address}/api/sessions/{session}")["utterances"][-1]["first"]
        shown = page.evaluate("(first) => [...shownAt].filter(([n]) => n >= first && n < first + 3).sort((a, b) => a[0] - b[0])[0] ?? null", first)
        heard = page.evaluate("heard[0] ?? null")
        row = {"minute": (time.monotonic() - began) / 60, "mb": psutil.Process(server).memory_info().rss / 1e6}
        if shown:
            row["latency"] = shown[1] - pushed
            if heard is not None:
                row["offset"] = heard - (shown[1] - 40 * (shown[0] - first))
        rows.append(row)
        page.evaluate("() => { const newest = Math.max(...shownAt.keys()); for (const n of shownAt.keys()) if (n < newest - 500) shownAt.delete(n); }")
    figures = get(f"{address}/api/sessions/{session}")["figures"]
    return _summary(rows) | {"session": figures} | ({} if minutes is None else {"by_5_minutes": _by_time(rows)})


def _summary(rows: list[dict]) -> dict:
    return {
        "first_lips_ms": percentiles([row["latency"] for row in rows if "latency" in row]),
        "sound_after_picture_ms": percentiles([row["offset"] for row in rows if "offset" in row]),
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
            found = measure(page, address, server.pid, options.minutes, options.utterances, options.seconds, options.pause)
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
