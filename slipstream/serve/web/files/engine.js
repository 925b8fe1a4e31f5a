// The engine's numbers, about once a second, out of /metrics.

import { ServerError, call } from "./server.js";

const SECOND = 1000; // milliseconds
const NUM_SECONDS = 60; // of the chart
const NUM_BARS = 9; // at least, of a histogram
const RATE_SECONDS = 3; // one rate is over so many: the numbers come to the server in beats
const byId = (id) => document.getElementById(id);

export async function watchEngine() {
  const counts = []; // {time, tokens}, the newest last
  const rates = [];
  for (;;) {
    if (!document.hidden) await look(counts, rates);
    await new Promise((resolve) => setTimeout(resolve, SECOND));
  }
}

async function look(counts, rates) {
  try {
    const response = await call("metrics", { mayAskForKey: false });
    const metrics = parseMetrics(await response.text());
    noteTokens(counts, rates, metrics.generation_tokens_total.value);
    show(metrics, rates);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    byId("state").textContent = "no numbers";
    byId("state").className = "soft bad";
  }
}

/** Prometheus' text: by name {value, values}, or {buckets: [{bound, upTo}]} of a histogram; of all engines together. */
export function parseMetrics(text) {
  const metrics = {};
  for (const line of text.split("\n")) {
    const found = line.match(/^slipstream:(\w+?)(_bucket)?\{(.*)\} (\S+)$/);
    if (found === null) continue;
    const [, name, isBucket, labels, value] = found;
    const metric = (metrics[name] ??= { value: 0, values: [], buckets: [] });
    if (isBucket) {
      const words = labels.match(/le="([^"]+)"/)[1];
      const bound = words === "+Inf" ? Infinity : Number(words);
      const known = metric.buckets.find((bucket) => bucket.bound === bound);
      if (known) known.upTo += Number(value);
      else metric.buckets.push({ bound, upTo: Number(value) });
    } else {
      metric.values.push(Number(value));
      metric.value += Number(value);
    }
  }
  return metrics;
}

function noteTokens(counts, rates, tokens) {
  if (counts.length > 0 && tokens < counts.at(-1).tokens) counts.length = 0; // another engine
  counts.push({ time: performance.now(), tokens });
  if (counts.length > RATE_SECONDS + 1) counts.shift();
  const [first, last] = [counts[0], counts.at(-1)];
  rates.push(counts.length > 1 ? (SECOND * (last.tokens - first.tokens)) / (last.time - first.time) : 0);
  if (rates.length > NUM_SECONDS) rates.shift();
}

function show(metrics, rates) {
  const { value: numBlocks, values: blocksOfEach } = metrics.kv_cache_blocks;
  const numUsed = blocksOfEach.reduce((sum, blocks, engine) => sum + blocks * metrics.kv_cache_usage_perc.values[engine], 0);
  byId("state").textContent = numBlocks > 0 ? "ready" : "the engine is being started";
  byId("state").className = numBlocks > 0 ? "soft good" : "soft bad";
  byId("rate").textContent = rates.at(-1).toFixed(1);
  byId("running").textContent = metrics.num_requests_running.value;
  byId("waiting").textContent = metrics.num_requests_waiting.value;
  byId("blocks").textContent = `${Math.round(numUsed)} of ${numBlocks}`;
  byId("blocks_bar").style.width = `${(100 * numUsed) / Math.max(1, numBlocks)}%`;
  showAcceptance(metrics);
  byId("rate_peak").textContent = `at most ${Math.max(...rates).toFixed(1)}`;
  drawBars(byId("rate_chart"), [...Array(NUM_SECONDS - rates.length).fill(0), ...rates]);
  showHistogram("ttft", metrics.time_to_first_token_seconds.buckets);
  showHistogram("itl", metrics.inter_token_latency_seconds.buckets);
}

/** Tokens of a step and sequence, of an engine that drafts. */
function showAcceptance({ spec_decode_num_drafts_total: drafts, spec_decode_num_accepted_tokens_total: accepted }) {
  byId("acceptance_row").hidden = drafts === undefined;
  if (drafts !== undefined) byId("acceptance").textContent = (1 + accepted.value / Math.max(1, drafts.value)).toFixed(2);
}

function showHistogram(id, buckets) {
  const counts = buckets.map(({ upTo }, index) => upTo - (index > 0 ? buckets[index - 1].upTo : 0));
  const first = counts.findIndex(Boolean);
  if (first < 0) {
    byId(id).textContent = "none yet";
    byId(`${id}_chart`).replaceChildren();
    byId(`${id}_axis`).textContent = "";
    return;
  }
  const last = counts.findLastIndex(Boolean);
  const margin = Math.max(1, Math.ceil((NUM_BARS - (last - first + 1)) / 2));
  const from = Math.max(0, first - margin);
  const to = Math.min(counts.length - 1, last + margin);
  byId(id).textContent = `median ${duration(quantile(buckets, 0.5))}, 99 % ${duration(quantile(buckets, 0.99))}`;
  drawBars(byId(`${id}_chart`), counts.slice(from, to + 1));
  const ends = [from > 0 ? buckets[from - 1].bound : 0, buckets[to].bound].map((bound) => {
    const end = document.createElement("span");
    end.textContent = duration(bound);
    return end;
  });
  byId(`${id}_axis`).replaceChildren(...ends);
}

/** As Prometheus has it: within a bucket the values lie evenly. */
export function quantile(buckets, part) {
  const rank = part * buckets.at(-1).upTo;
  const index = buckets.findIndex(({ upTo }) => upTo >= rank);
  const [start, before] = index > 0 ? [buckets[index - 1].bound, buckets[index - 1].upTo] : [0, 0];
  const { bound, upTo } = buckets[index];
  return bound === Infinity ? start : start + ((bound - start) * (rank - before)) / (upTo - before);
}

function duration(seconds) {
  if (seconds === Infinity) return "∞";
  if (seconds >= 1) return `${Number(seconds.toPrecision(3))} s`;
  return `${Number((1000 * seconds).toPrecision(2))} ms`;
}

function drawBars(chart, values) {
  while (chart.children.length < values.length) chart.append(document.createElement("div"));
  while (chart.children.length > values.length) chart.lastChild.remove();
  const largest = Math.max(...values, Number.MIN_VALUE);
  values.forEach((value, index) => (chart.children[index].style.height = `${(100 * value) / largest}%`));
}
