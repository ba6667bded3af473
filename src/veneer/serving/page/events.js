// Reads the server's answers: JSON, and streams of events.

export class ServerError extends Error {}

export function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

export async function fetchJson(address, key, method = "GET", body = undefined) {
  const response = await send(address, key, method, body);
  return response.status === 204 ? null : response.json();
}

export async function send(address, key, method, body, signal) {
  const options = { method, headers: headers(key), signal };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new ServerError(told?.error?.message ?? `The server answers ${response.status}.`);
  error.status = response.status;
  throw error;
}

// Yields the events of a stream, each parsed; throws where it ends before it says that it is done.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The stream ended early.");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}
