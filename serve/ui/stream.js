// Talks to the server: one reply as it comes.

export class Refused extends Error {}

export async function call(path, body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(said.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

export async function* reply(body, key, signal) {
  const answer = await call("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, key, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Refused(piece.error.message);
      yield piece;
    }
  }
}
