"""What `benchmarks.live` runs in the page: JavaScript, and the browser's own clock for everything."""

READ = """() => {
  window.shownAt = new Map(); window.heard = []; window.pictures = null;
  const video = document.getElementById("video"), canvas = document.createElement("canvas"), small = document.createElement("canvas");
  canvas.width = 256; canvas.height = 8; small.width = small.height = 32;
  const [pen, brush] = [canvas, small].map((one) => one.getContext("2d", { willReadFrequently: true }));
  const look = (_, { expectedDisplayTime: now }) => {
    pen.drawImage(video, 0, 0, 256, 8, 0, 0, 256, 8);
    const row = pen.getImageData(0, 4, 256, 1).data, bit = (i) => row[4 * (8 * i + 4)] > 127;
    if (bit(0) && !bit(1)) { let n = 0; for (let i = 2; i < 26; i++) n = 2 * n + bit(i); if (!shownAt.has(n)) shownAt.set(n, now); }
    if (pictures) {
      brush.drawImage(video, 0, 16, 256, 240, 0, 0, 32, 32);
      pictures.push([now, [...brush.getImageData(0, 0, 32, 32).data].filter((_, i) => i % 4 < 3)]);
    }
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
}"""
# The worklet hears a sound before the device that plays it does, and the browser allows for that device when it keeps lips and sound together.
LISTEN = """async () => {
  const video = document.getElementById("video"), context = new AudioContext({ sampleRate: 48000 });
  await context.resume();
  const code = `registerProcessor("level", class extends AudioWorkletProcessor { process(inputs) {
    const x = inputs[0][0]; if (x) { let s = 0; for (const v of x) s += v * v; this.port.postMessage(Math.sqrt(s / x.length)); } return true; } });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const node = new AudioWorkletNode(context, "level");
  node.port.onmessage = ({ data: level }) => { if (level > 0.05) heard.push(performance.now() + 1000 * context.outputLatency); };
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
INTERRUPT = """async (id) => {
  const at = performance.now();
  await fetch(`/api/sessions/${id}/interrupt`, { method: "POST" });
  return at;
}"""
SWAP = """async ([id, avatar]) => {
  const at = performance.now();
  await fetch(`/api/sessions/${id}`, { method: "PATCH", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ avatar }) });
  return [at, performance.now()];
}"""
# Means over all pictures that were received, and how much later than its picture the browser now plays a sound, by its own account.
STATS = """async () => {
  const rows = {};
  for (const row of (await window.pikastream.peer.getStats()).values()) if (row.type === "inbound-rtp") rows[row.kind] = row;
  const { audio, video } = rows;
  return {
    buffer: 1000 * video.jitterBufferDelay / video.jitterBufferEmittedCount, decode: 1000 * video.totalDecodeTime / video.framesDecoded,
    offset: video.estimatedPlayoutTimestamp - audio.estimatedPlayoutTimestamp,
  };
}"""
