// The conversation: what is asked, with what, and the answers.

import { Answer, element } from "./answer.js";
import { ServerError, call, events } from "./server.js";
import { showTokensOf } from "./tokens.js";

const NUM_ALTERNATIVES = 5;
const [conversation, spoken, composer, message, label, stop, send, clear, sampling, settings] = [
  "conversation", "spoken", "composer", "message", "message_label", "stop", "send", "clear", "sampling", "settings",
].map((id) => document.getElementById(id)); // prettier-ignore
const greeting = document.getElementById("greeting");

let messages = [];
let unansweredCalls = []; // tool calls whose results are asked for
let running = null; // AbortController of the answer that is being written

export function startChat() {
  showTokensOf(conversation, document.getElementById("tooltip"));
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", ({ key }) => key === "Escape" && running?.abort());
  stop.addEventListener("click", () => running?.abort());
  clear.addEventListener("click", startAgain);
  sampling.addEventListener("submit", (event) => event.preventDefault());
  showModel();
}

async function showModel() {
  try {
    const { data } = await (await call("v1/models")).json();
    document.getElementById("model").textContent = data[0].id;
  } catch (error) {
    complain(error);
  }
}

async function ask() {
  const text = message.value;
  if (running !== null || !text.trim()) return;
  let fields;
  try {
    fields = chosenFields();
  } catch (error) {
    complain(error);
    return;
  }
  if (fields === null) return;
  const question = addQuestion(text);
  if (unansweredCalls.length > 0) return;
  const answer = new Answer(spokenInSentences());
  conversation.append(answer.element);
  scrollToEnd();
  const wasWhole = await stream(answer, { ...fields, messages: [...systemMessages(), ...messages] });
  if (!question.isConnected) return; // there is a new chat
  if (!wasWhole && answer.isEmpty && messages.at(-1).role === "user") takeBack(question, answer, text);
  else note(answer);
}

/** Whether it came to its end. */
async function stream(answer, body) {
  running = new AbortController();
  showRunning();
  let why = null;
  try {
    const response = await call("v1/chat/completions", { body, signal: running.signal });
    for await (const chunk of events(response)) {
      following(() => answer.push(chunk));
    }
  } catch (error) {
    why = error.name === "AbortError" ? "stopped" : "broken off";
    if (why !== "stopped") complain(error);
  }
  running = null;
  following(() => answer.end(why));
  showRunning();
  return why === null;
}

/** Null where a field is at fault, which the browser then shows. */
function chosenFields() {
  if (!sampling.checkValidity()) {
    settings.open = true;
    sampling.reportValidity();
    return null;
  }
  const fields = { stream: true, stream_options: { include_usage: true } };
  for (const input of sampling.querySelectorAll("input[type=number]")) {
    if (input.value !== "") fields[input.name] = input.valueAsNumber;
  }
  if (document.getElementById("probabilities").checked) {
    Object.assign(fields, { logprobs: true, top_logprobs: NUM_ALTERNATIVES });
  }
  const tools = document.getElementById("tools").value;
  if (tools.trim()) fields.tools = parsedTools(tools);
  return fields;
}

function parsedTools(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ServerError(`Tools are not JSON: ${error.message}`);
  }
}

function systemMessages() {
  const content = document.getElementById("system").value;
  return content.trim() ? [{ role: "system", content }] : [];
}

/** A message of the user's or, after tool calls, the result of the next of them. */
function addQuestion(text) {
  conversation.querySelector("[role=alert]")?.remove();
  greeting.hidden = true;
  const called = unansweredCalls.shift();
  const shown = element("article", called ? "question result" : "question");
  shown.ariaLabel = called ? `Result of ${called.function.name}` : "You";
  shown.textContent = text;
  conversation.append(shown);
  messages.push(called ? { role: "tool", tool_call_id: called.id, content: text } : { role: "user", content: text });
  message.value = "";
  showLabel();
  scrollToEnd();
  return shown;
}

function note(answer) {
  messages.push(answer.message);
  unansweredCalls = answer.toolCalls;
  showLabel();
}

/** The question that nothing came of is there to be sent again. */
function takeBack(question, answer, text) {
  messages.pop();
  question.remove();
  answer.element.remove();
  message.value ||= text;
}

function startAgain() {
  running?.abort();
  messages = [];
  unansweredCalls = [];
  conversation.replaceChildren(greeting);
  greeting.hidden = false;
  showLabel();
  message.focus();
}

function showRunning() {
  const isRunning = running !== null;
  const hadFocus = document.activeElement === (isRunning ? send : stop);
  stop.hidden = !isRunning;
  send.hidden = isRunning;
  conversation.ariaBusy = String(isRunning);
  if (hadFocus) (isRunning ? stop : message).focus();
}

function showLabel() {
  label.textContent = unansweredCalls.length > 0 ? `Result of ${unansweredCalls[0].function.name}` : "Message";
}

function complain(error) {
  if (!(error instanceof ServerError)) throw error;
  conversation.querySelector("[role=alert]")?.remove();
  const shown = element("p", "problem");
  shown.role = "alert";
  shown.textContent = error.message;
  conversation.append(shown);
  scrollToEnd();
}

/** What a screen reader is given: whole sentences, not tokens. Null ends the answer. */
function spokenInSentences() {
  let rest = "";
  spoken.replaceChildren();
  return (text) => {
    const parts = (rest + (text ?? "\n")).split(/(?<=[.!?:]\s|\n)/);
    rest = /[.!?:]\s$|\n$/.test(parts.at(-1)) ? "" : parts.pop();
    for (const sentence of parts.filter((part) => part.trim())) {
      const line = element("p");
      line.textContent = sentence;
      spoken.append(line);
    }
  };
}

/** Whoever reads at the end stays there; whoever has scrolled back is left alone. */
function following(change) {
  const isAtEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
  change();
  if (isAtEnd) scrollToEnd();
}

function scrollToEnd() {
  conversation.scrollTop = conversation.scrollHeight;
}
