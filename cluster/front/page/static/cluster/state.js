// What `GET /cluster` says, as the view needs it. Pure.

const GONE = new Set(["lost", "left"]);
const CALM = new Set(["recovering", "asleep"]);
const NO_PLAN = { stages: [], kv_blocks: 0 }; // of a model that was never loaded

/** `sample`: {at, cluster} now; `before`: the same at an earlier time, for rates; null at first. */
export function viewState({ at, cluster }, before = null) {
  const { status, links = [], sequences = [] } = cluster;
  const plan = cluster.plan ?? NO_PLAN;
  const elapsed = before ? (at - before.at) / 1000 : 0;
  const planned = new Map(plan.stages.map((stage) => [stage.worker, stage]));
  const earlier = new Map((before?.cluster.status.workers ?? []).map((worker) => [worker.name, worker]));
  const workers = status.workers.map((worker) => ({
    ...worker,
    condition: worker.drained && worker.state === "ready" ? "drained" : worker.state,
    planned: planned.get(worker.name) ?? null,
    busy: GONE.has(worker.state) ? 0 : worker.busy,
    sentRate: byteRate(worker, earlier.get(worker.name), elapsed),
  }));
  const byName = new Map(workers.map((worker) => [worker.name, worker]));
  const of = (stage) => byName.get(stage.worker) ?? absentWorker(stage);
  const leaders = plan.stages.filter(leads);
  const followers = plan.stages.filter((stage) => !leads(stage));
  return {
    status,
    plan,
    links,
    sequences,
    layerCount: Math.max(0, ...plan.stages.map((stage) => stage.end)),
    stages: leaders.map(of),
    others: [...followers.map(of), ...workers.filter((worker) => !planned.has(worker.name))],
    /** For each of the first `others`, the index of the stage that it shares: members follow their group's leader. */
    sharedStages: followers.map((stage) => leaders.findLastIndex((leader) => plan.stages.indexOf(leader) < plan.stages.indexOf(stage))),
    workers,
    notices: notices(status),
  };
}

/** Whether microbatches come to a worker of the plan: it holds its layers alone, or leads a group. */
function leads({ member = 0 }) {
  return member === 0;
}

/** Bytes of microbatches per second since the sample before; null where it cannot be known. */
function byteRate(worker, earlier, elapsed) {
  const [now, then] = [worker.heartbeat?.sent_bytes, earlier?.heartbeat?.sent_bytes];
  const isKnown = elapsed > 0 && now !== undefined && then !== undefined && earlier.pid === worker.pid && now >= then;
  return isKnown ? (now - then) / elapsed : null;
}

/** A worker of the plan that is not connected. */
function absentWorker(stage) {
  const nothing = { layers: null, memory_bytes: 0, busy: 0, tokens_per_s: 0, decode_ms: null, heartbeat: null };
  return { name: stage.worker, state: "lost", condition: "lost", planned: stage, sentRate: null, drained: false, ...nothing };
}

function notices(status) {
  const gone = status.workers.filter(({ state }) => state === "lost").map(({ name }) => name);
  const found = [];
  if (status.state !== "ready") found.push({ isBad: !CALM.has(status.state), text: stateText(status) });
  if (gone.length) found.push({ isBad: true, text: `lost: ${gone.join(", ")}` });
  if (status.absent.length) found.push({ isBad: true, text: `missing: ${status.absent.join(", ")}` });
  if (status.insecure) found.push({ isBad: false, text: "workers may join without a token (insecure: true)" });
  return found;
}

function stateText({ state, reason }) {
  return `${state}${reason ? `: ${reason}` : ""}`;
}
