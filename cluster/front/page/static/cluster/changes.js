// What happened between two readings of the cluster, so that nothing is missed that lasts less than their distance. Pure.

const GONE = new Set(["lost", "left"]);

/** Lines of text, in the order of the workers; none for the first reading (`before` null). */
export function changes(before, now) {
  if (before === null) return [];
  const earlier = new Map(before.status.workers.map((worker) => [worker.name, worker]));
  const ofWorkers = now.status.workers.flatMap((worker) => workerChanges(earlier.get(worker.name), worker));
  return [...ofWorkers, ...clusterChanges(before.status, now.status)];
}

function workerChanges(before, now) {
  if (!before) return [`${now.name} joined`];
  const [wasGone, isGone] = [GONE.has(before.state), GONE.has(now.state)];
  const found = [];
  if (!wasGone && (isGone || now.pid !== before.pid)) found.push(`${now.name} was lost`);
  if (!isGone && (wasGone || now.pid !== before.pid)) found.push(`${now.name} is back`);
  if (now.drained !== before.drained) found.push(now.drained ? `${now.name} is drained` : `${now.name} is undrained`);
  if (!isGone && String(now.layers) !== String(before.layers)) {
    found.push(now.layers ? `${now.name} holds layers ${now.layers[0]}–${now.layers[1] - 1}` : `${now.name} holds no layers`);
  }
  return found;
}

function clusterChanges(before, now) {
  const found = [];
  if (now.state !== before.state) found.push(`the cluster is ${now.state}`);
  if (now.recoveries > before.recoveries) {
    const seconds = now.recovery_seconds.at(-1);
    found.push(seconds === undefined ? "recovered" : `recovered in ${seconds.toFixed(2)} s`);
  }
  return found;
}
