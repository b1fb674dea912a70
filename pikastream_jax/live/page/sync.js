// Keeps lips and sound closer together than browsers do, which leave them up to 30 ms apart and take many seconds for more: whichever of the two is
// early is held in its buffer for as much longer. In browsers that have no `jitterBufferTarget` nothing changes.
const PERIOD = 2000; // ms: the browser's own account of what is played is a second old
const CLOSE = 5; // ms apart that are left alone
const SHARE = 0.6; // of what they are apart that is mended at a time, so that nothing swings
const THEIRS = 50; // ms apart from which on the browser mends it: two that mend the same thing would delay both streams, for good

const other = { audio: "video", video: "audio" };

export async function keepTogether(peer) {
  const receivers = Object.fromEntries(peer.getReceivers().map((receiver) => [receiver.track.kind, receiver]));
  if (!receivers.audio || !receivers.video || !("jitterBufferTarget" in receivers.audio)) return;
  let before = null;
  while (peer.connectionState === "connected") {
    const rows = {};
    for (const row of (await peer.getStats()).values()) if (row.type === "inbound-rtp") rows[row.kind] = row;
    const apart = rows.video?.estimatedPlayoutTimestamp - rows.audio?.estimatedPlayoutTimestamp; // ms by which sound comes after its picture
    if (Math.abs(apart) > THEIRS) for (const receiver of Object.values(receivers)) receiver.jitterBufferTarget = 0;
    else if (before && Math.abs(apart) > CLOSE) mend(receivers, lately(before, rows), apart);
    before = rows;
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
  }
}

// How long packets stayed in the buffers since the last look, in ms.
function lately(before, rows) {
  const since = (kind, name) => rows[kind][name] - (before[kind]?.[name] ?? 0);
  return Object.fromEntries(Object.keys(other).map((kind) => [kind, 1000 * since(kind, "jitterBufferDelay") / Math.max(1, since(kind, "jitterBufferEmittedCount"))]));
}

function mend(receivers, waits, apart) {
  const early = apart < 0 ? "audio" : "video", late = other[early], amount = SHARE * Math.abs(apart);
  const held = receivers[late].jitterBufferTarget;
  // What holds the late one back is taken away before the early one is held back: neither should wait for the other more than it must.
  if (held && held > waits[late] - THEIRS) receivers[late].jitterBufferTarget = Math.max(0, Math.min(held, waits[late]) - amount);
  else {
    receivers[late].jitterBufferTarget = 0;
    receivers[early].jitterBufferTarget = Math.min(1000, Math.max(receivers[early].jitterBufferTarget ?? 0, waits[early]) + amount);
  }
}
