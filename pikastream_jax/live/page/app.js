// The page of a live session: WebRTC first, MP4 over a WebSocket where no packet comes through.
import { keepTogether } from "./sync.js";

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const IDEAS = ["smiling warmly", "with a neutral expression", "looking sad", "with the head tilted to the left", "looking up"];
const CONNECTING = 8000; // ms after which another transport is tried, or another attempt made
let session = null, peer = null, avatar = null, microphone = null, audioSocket = null, polling = null, wanted = false, attempt = 0, viewer = null;

const address = (path) => token ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token)}` : path;
const socketAddress = (path) => address(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`);

function say(text) { $("message").textContent = text; }
function show(state, text) { $("state").dataset.state = state; $("state").textContent = text; }

async function call(path, options = {}) {
  const answer = await fetch(address(path), options);
  const body = answer.status === 204 ? {} : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.error), { status: answer.status });
  return body;
}
const sendJson = (path, body, method = "POST") => call(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

async function drawAvatars() {
  const found = await call("/api/avatars");
  avatar ??= found[0].name;
  $("avatars").replaceChildren(...found.map(({ name, picture }) => {
    const button = Object.assign(document.createElement("button"), { type: "button", title: name });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(name === avatar));
    button.setAttribute("aria-label", name);
    button.append(Object.assign(new Image(), { src: address(picture), alt: "" }));
    button.onclick = () => choose(name);
    return button;
  }));
}

async function choose(name) {
  avatar = name;
  $("image").value = "";
  for (const button of $("avatars").children) button.setAttribute("aria-checked", String(button.title === name));
  if (session) await change({ avatar: name });
}

async function change(fields) {
  try {
    say("");
    await sendJson(`/api/sessions/${session}`, fields, "PATCH");
  } catch (error) { say(error.message); }
}

function form(fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  body.append("image", $("image").files[0]);
  body.append("consent", $("consent").checked);
  return body;
}

async function open() {
  const fields = { prompt: $("prompt").value, seed: 0 };
  const report = $("image").files.length
    ? await call("/api/sessions", { method: "POST", body: form(fields) })
    : await sendJson("/api/sessions", { ...fields, avatar });
  session = report.id;
}

async function watch() {
  const number = ++attempt;
  peer?.close();
  peer = new RTCPeerConnection();
  const stream = new MediaStream();
  peer.addTransceiver("video", { direction: "recvonly" });
  const sound = peer.addTransceiver("audio", { direction: "sendrecv" });
  if (microphone) await sound.sender.replaceTrack(microphone.getAudioTracks()[0]);
  peer.ontrack = ({ track }) => { stream.addTrack(track); $("video").srcObject = stream; };
  const connected = new Promise((resolve) => {
    peer.onconnectionstatechange = () => {
      if (number !== attempt) return;
      if (peer.connectionState === "connected") { show("live", "live"); keepTogether(peer); resolve(true); }
      if (["failed", "disconnected"].includes(peer.connectionState)) { resolve(false); again(); }
    };
  });
  await peer.setLocalDescription(await peer.createOffer());
  await new Promise((resolve) => {
    if (peer.iceGatheringState === "complete") return resolve();
    peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && resolve());
    setTimeout(resolve, 2000);
  });
  const { sdp, peer: name } = await sendJson(`/api/sessions/${session}/webrtc`, { type: "offer", sdp: peer.localDescription.sdp });
  viewer = name;
  await peer.setRemoteDescription({ type: "answer", sdp });
  const answered = await Promise.race([connected, new Promise((resolve) => setTimeout(resolve, CONNECTING, false))]);
  if (number === attempt && !answered && wanted) { peer.close(); watchSocket(number); }
}

// Two source buffers; never fed while they work, and played a little faster where they lag.
function watchSocket(number) {
  show("live", "live, over WebSocket");
  const video = $("video"), source = new MediaSource();
  video.srcObject = null;
  video.src = URL.createObjectURL(source);
  source.onsourceopen = () => {
    const buffers = ['video/mp4; codecs="avc1.42c01f"', 'audio/mp4; codecs="opus"'].map((type) => source.addSourceBuffer(type));
    const queues = [[], []];
    const feed = (i) => { if (!buffers[i].updating && queues[i].length) buffers[i].appendBuffer(queues[i].shift()); };
    buffers.forEach((buffer, i) => buffer.addEventListener("updateend", () => {
      const { buffered } = video;
      if (buffered.length) {
        const lag = buffered.end(buffered.length - 1) - video.currentTime;
        video.playbackRate = lag > 0.2 ? 1.08 : 1;
        if (lag > 1) video.currentTime = buffered.end(buffered.length - 1) - 0.1;
        if (!buffer.updating && video.currentTime - buffered.start(0) > 20) return buffer.remove(0, video.currentTime - 10);
      }
      feed(i);
    }));
    const socket = new WebSocket(socketAddress(`/api/sessions/${session}/video`));
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => { const i = new Uint8Array(data)[0]; queues[i].push(data.slice(1)); feed(i); };
    socket.onclose = () => { if (number === attempt) again(); };
    video.play().catch(() => say("press play to hear the avatar"));
  };
}

// The connection was lost: once more, into the same session while it lives, else into a new one.
async function again() {
  if (!wanted) return;
  show("lost", "connection lost, trying again");
  await new Promise((resolve) => setTimeout(resolve, 1000));
  if (!wanted) return;
  try {
    await call(`/api/sessions/${session}`);
    await watch();
  } catch (error) {
    if (error.status === 404) { try { await open(); await watch(); return; } catch (other) { say(other.message); } }
    again();
  }
}

async function start() {
  say("");
  wanted = true;
  show("connecting", "connecting");
  $("connect").textContent = "Stop";
  try {
    await open();
    await watch();
    $("figures").hidden = false;
    polling = setInterval(figures, 1000);
  } catch (error) {
    say(error.message);
    await stop();
  }
}

async function stop() {
  wanted = false;
  attempt++;
  clearInterval(polling);
  peer?.close();
  audioSocket?.close();
  audioSocket = null;
  if (session) await call(`/api/sessions/${session}`, { method: "DELETE" }).catch(() => {});
  session = null;
  $("connect").textContent = "Start";
  $("figures").hidden = true;
  show("idle", "not connected");
}

let shown = 0;
function count() { shown++; $("video").requestVideoFrameCallback(count); }
$("video").requestVideoFrameCallback?.(count);

async function figures() {
  $("fps").textContent = shown;
  shown = 0;
  try {
    const { figures } = await call(`/api/sessions/${session}`);
    $("chunk").textContent = `${Math.round(figures.chunk_ms.p50)} ms`;
    $("late").textContent = figures.late_frames;
    const stats = [...(await peer.getStats()).values()].find((row) => row.type === "inbound-rtp" && row.kind === "video");
    const buffered = stats?.jitterBufferEmittedCount ? (1000 * stats.jitterBufferDelay) / stats.jitterBufferEmittedCount : 0;
    $("latency").textContent = `${Math.round(figures.lead_ms + buffered)} ms + wait`;
  } catch { /* the next one tells */ }
}

async function voiceSocket(rate) {
  const socket = new WebSocket(socketAddress(`/api/sessions/${session}/audio?rate=${rate}`));
  socket.onmessage = ({ data }) => { const { error } = JSON.parse(data); if (error) say(error); };
  socket.onclose = () => { if (audioSocket === socket) audioSocket = null; };
  await new Promise((resolve, reject) => { socket.onopen = resolve; socket.onerror = () => reject(new Error("the voice did not get through")); });
  return socket;
}

async function speak(bytes) {
  const context = new AudioContext({ sampleRate: 48000 });
  const sound = await context.decodeAudioData(bytes);
  await context.close();
  const mono = new Float32Array(sound.length);
  for (let c = 0; c < sound.numberOfChannels; c++) sound.getChannelData(c).forEach((x, i) => { mono[i] += x / sound.numberOfChannels; });
  audioSocket ??= await voiceSocket(48000);
  const piece = 48000;
  for (let at = 0; at < mono.length; at += piece) audioSocket.send(Int16Array.from(mono.subarray(at, at + piece), (x) => 32767 * Math.max(-1, Math.min(1, x))));
  audioSocket.send("end");
}

$("controls").onsubmit = (event) => { event.preventDefault(); wanted ? stop() : start(); };
$("apply").onclick = () => session && change({ prompt: $("prompt").value });
$("prompt").onkeydown = (event) => { if (event.key === "Enter" && session) { event.preventDefault(); change({ prompt: $("prompt").value }); } };
$("interrupt").onclick = () => session && call(`/api/sessions/${session}/interrupt`, { method: "POST" }).catch((error) => say(error.message));
$("image").onchange = async () => {
  if (!session || !$("image").files.length) return;
  try { say(""); await call(`/api/sessions/${session}`, { method: "PATCH", body: form({}) }); } catch (error) { say(error.message); }
};
$("voice").onchange = async () => {
  if (!session || !$("voice").files.length) return say(session ? "" : "start first");
  try { say(""); await speak(await $("voice").files[0].arrayBuffer()); } catch (error) { say(error.message || "this file cannot be decoded"); }
  $("voice").value = "";
};
$("mic").onclick = async () => {
  try {
    if (microphone) { microphone.getTracks().forEach((track) => track.stop()); microphone = null; }
    else microphone = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true } });
    $("mic").setAttribute("aria-pressed", String(!!microphone));
    const sender = peer?.getTransceivers().find((one) => one.receiver.track.kind === "audio")?.sender;
    await sender?.replaceTrack(microphone ? microphone.getAudioTracks()[0] : null);
  } catch (error) { say(`no microphone: ${error.message}`); }
};
$("ideas").replaceChildren(...IDEAS.map((idea) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: idea });
  button.onclick = () => { $("prompt").value = `a person ${idea}`; if (session) change({ prompt: $("prompt").value }); };
  return button;
}));
drawAvatars().catch((error) => say(error.message));
// For whoever drives the page from outside.
window.pikastream = { get session() { return session; }, get viewer() { return viewer; }, get peer() { return peer; } };
