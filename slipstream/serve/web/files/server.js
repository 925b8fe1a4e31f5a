// Calls of the server, with its API key where it needs one.

const KEY = "slipstream-api-key"; // in sessionStorage: of this tab, until it is closed

/** Its message is one sentence for people. */
export class ServerError extends Error {}

/** GET, or POST where there is a body. Paths have no leading slash, so that a proxy may serve all under a folder. */
export async function call(path, { body, signal, mayAskForKey = true } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, body, signal, key);
    if (response.ok) return response;
    if (response.status !== 401 || !mayAskForKey) throw new ServerError(await sentence(response));
    if (key === sessionStorage.getItem(KEY)) await askForKey();
  }
}

/** The JSON values of a stream of server-sent events, until [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer did.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const data of parts.map((part) => part.replace(/^data: /, ""))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
  }
}

async function send(path, body, signal, key) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  try {
    return await fetch(path, { method, headers, signal, body: JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

let asking = null; // one dialog, whoever waits for it

function askForKey() {
  asking ??= showDialog().finally(() => (asking = null));
  return asking;
}

function showDialog() {
  const [dialog, form, input, cancel] = ["key_dialog", "key_form", "key", "key_cancel"].map((id) =>
    document.getElementById(id),
  );
  return new Promise((resolve, reject) => {
    form.onsubmit = () => dialog.close(input.value.trim());
    cancel.onclick = () => dialog.close("");
    dialog.onclose = () => {
      input.value = "";
      if (dialog.returnValue === "") return reject(new ServerError("This server needs an API key."));
      sessionStorage.setItem(KEY, dialog.returnValue);
      dialog.returnValue = "";
      resolve();
    };
    dialog.showModal();
  });
}
