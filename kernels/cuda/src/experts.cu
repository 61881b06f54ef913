// Steps around the products of a mixture of experts: choosing the experts of each row, grouping rows by expert, and
// adding the results. A line is a row and a rank: row * used + rank.
#include "elementwise/lines.cuh"
#include "math.cuh"

namespace llamaclust::cuda {
namespace {

constexpr float kLeastWeightSum = 0x1p-14f;
constexpr int kSoftmax = 0, kSigmoid = 1, kSoftmaxOfChosen = 2;

DEVICE float infinity() { return __int_as_float(0x7f800000); }

struct Candidate {
  float value;
  int32_t id;
  // Greater values come first; of equal ones, the lower id. NaN never comes first.
  DEVICE bool before(Candidate other) const { return value > other.value || (value == other.value && id < other.id); }
};

DEVICE Candidate best_of(const float* probabilities, int experts) {
  Candidate best{-infinity(), experts};
  for (int id = threadIdx.x % kWarp; id < experts; id += kWarp)
    if (probabilities[id] > best.value) best = {probabilities[id], id};
  for (int with = kWarp / 2; with > 0; with /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, best.value, with);
    const Candidate other{value, __shfl_xor_sync(kAllLanes, best.id, with)};
    if (other.before(best)) best = other;
  }
  return best;
}

DEVICE void softmax(float* x, int n) {
  const int lane = threadIdx.x % kWarp;
  float greatest = x[0];
  for (int i = lane; i < n; i += kWarp) greatest = greatest > x[i] ? greatest : x[i];
  greatest = reduce(greatest, [](float a, float b) { return a > b ? a : b; });
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) x[i] = exp(sub(x[i], greatest));
  __syncwarp();
  Lanes lanes;
  lanes.add_elements(n, [x](float sum, int i) { return add(sum, x[i]); });
  const float sum = lanes.total();
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) x[i] = div(x[i], sum);
  __syncwarp();
}

DEVICE float sum_of_best_two(const float* x, int count) {
  float first = -infinity(), second = first;
  for (int i = 0; i < count; i++) {
    const float less = x[i] < first ? x[i] : first;
    second = second < less ? less : second;
    first = first < x[i] ? x[i] : first;
  }
  return count == 1 ? first : add(first, second);
}

// Sets the experts of all groups to -infinity, except those of the `used` groups whose two best experts have the
// greatest sums (the lower group among equal ones). `sums` and `kept` have a float for each group.
DEVICE void keep_groups(float* selection, int experts, int groups, int used, float* sums, float* kept) {
  const int lane = threadIdx.x % kWarp, each = experts / groups;
  for (int group = lane; group < groups; group += kWarp) {
    sums[group] = sum_of_best_two(selection + group * each, each);
    kept[group] = 0.0f;
  }
  __syncwarp();
  for (int i = 0; i < used; i++) {
    const Candidate best = best_of(sums, groups);
    __syncwarp();
    const int id = best.id < groups ? best.id : 0;
    if (lane == 0) sums[id] = -infinity(), kept[id] = 1.0f;
    __syncwarp();
  }
  for (int id = lane; id < experts; id += kWarp)
    if (kept[id / each] == 0.0f) selection[id] = -infinity();
  __syncwarp();
}

}  // namespace

// Chooses the `used` experts with the greatest scores + bias. Scores are the softmax of the logits (gating 0), their
// sigmoid (1), or the logits themselves (2). The weights of the chosen experts are their scores, or with gating 2 the
// softmax of the chosen scores; they are divided by their sum if `normalized`, then multiplied by `scale`, and then by
// the experts' `scales` unless these are null. If there are several `groups`, only experts of the best `used_groups`
// are chosen. A row of NaN chooses expert 0 at every rank. A warp has a row, with 2 * (experts + groups) + used floats
// of shared memory. Grid: rows / 4 rounded up, blocks of 128 threads.
KERNEL(128, choose, const float* __restrict__ logits, const float* __restrict__ bias, const float* __restrict__ scales,
       int32_t experts, int32_t used, int32_t groups, int32_t used_groups, int32_t gating, int32_t normalized, float scale,
       const int32_t* rows, int32_t* ids, float* weights) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = 4 * blockIdx.x + warp;
  if (row >= *rows) return;
  float* scores = reinterpret_cast<float*>(DYNAMIC_SHARED) + warp * (2 * (experts + groups) + used);
  float *selection = scores + experts, *sums = selection + experts, *chosen = sums + 2 * groups;
  for (int i = lane; i < experts; i += kWarp) scores[i] = logits[row * experts + i];
  __syncwarp();
  if (gating == kSoftmax) softmax(scores, experts);
  for (int i = lane; i < experts; i += kWarp) {
    if (gating == kSigmoid) scores[i] = sigmoid(scores[i]);
    selection[i] = bias == nullptr ? scores[i] : add(scores[i], bias[i]);
  }
  __syncwarp();
  if (groups > 1) keep_groups(selection, experts, groups, used_groups, sums, sums + groups);
  for (int rank = 0; rank < used; rank++) {
    const Candidate best = best_of(selection, experts);
    const int id = best.id < experts ? best.id : 0;
    __syncwarp();
    if (lane == 0) {
      ids[row * used + rank] = id;
      chosen[rank] = scores[id];
      selection[id] = -infinity();
    }
    __syncwarp();
  }
  if (gating == kSoftmaxOfChosen) softmax(chosen, used);
  float sum = 0.0f;
  for (int rank = 0; rank < used; rank++) sum = add(sum, chosen[rank]);
  sum = sum < kLeastWeightSum ? kLeastWeightSum : sum;
  for (int rank = lane; rank < used; rank += kWarp) {
    float weight = normalized != 0 ? div(chosen[rank], sum) : chosen[rank];
    if (scale != 1.0f) weight = mul(weight, scale);
    weights[row * used + rank] = scales == nullptr ? weight : mul(weight, scales[ids[row * used + rank]]);
  }
}

// Lines of products by head: line row * heads + h is row `row` of head h. Writes lines and items in the format of
// `group`, for all heads in order. Grid: any size, blocks of 256 threads.
KERNEL(256, by_head, int32_t heads, int32_t piece, const int32_t* rows, int32_t* lines, int32_t* items,
       int32_t* item_count) {
  const int all = *rows, pieces = (all + piece - 1) / piece, step = 256 * gridDim.x;
  const int thread = 256 * blockIdx.x + threadIdx.x;
  if (thread == 0) *item_count = heads * pieces;
  for (int i = thread; i < heads * all; i += step) lines[i] = i % all * heads + i / all;
  for (int i = thread; i < heads * pieces; i += step) {
    const int head = i / pieces, first = i % pieces * piece, left = all - first;
    int32_t* to = items + 3 * i;
    to[0] = head, to[1] = head * all + first, to[2] = left < piece ? left : piece;
  }
}

namespace {

// Returns the sum of x over the lanes of a warp up to and including this lane.
DEVICE int sum_so_far(int x) {
  const int lane = threadIdx.x % kWarp;
  for (int by = 1; by < kWarp; by *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, by);
    if (lane >= by) x += before;
  }
  return x;
}

// Number of an expert's lines, the place of the first line, and its first item.
struct Group {
  int32_t count, place, item;
};

// Computes where each expert's lines and items begin, from the counts. Returns the number of items. Called by one warp.
DEVICE int find_places(Group* groups, int experts, int piece) {
  const int lane = threadIdx.x % kWarp;
  int place = 0, item = 0;
  for (int first = 0; first < experts; first += kWarp) {
    const int count = first + lane < experts ? groups[first + lane].count : 0, pieces = (count + piece - 1) / piece;
    const int places = sum_so_far(count), items = sum_so_far(pieces);
    if (first + lane < experts) groups[first + lane] = {count, place + places - count, item + items - pieces};
    place += __shfl_sync(kAllLanes, places, kWarp - 1);
    item += __shfl_sync(kAllLanes, items, kWarp - 1);
  }
  return item;
}

}  // namespace

// Writes `lines` in ascending order of their experts, and the items {expert, first place in `lines`, count} of up to
// `piece` lines that products read. The lines of an expert are in arbitrary order, which differs from run to run;
// products compute each line independently. One block of 512 threads, with 3 * experts int32 of shared memory.
KERNEL(512, group, const int32_t* __restrict__ ids, int32_t used, int32_t experts, int32_t piece, const int32_t* rows,
       int32_t* lines, int32_t* items, int32_t* item_count) {
  constexpr int kThreads = 512;
  Group* groups = reinterpret_cast<Group*>(DYNAMIC_SHARED);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, all = *rows * used;
  for (int expert = thread; expert < experts; expert += kThreads) groups[expert].count = 0;
  __syncthreads();
  for (int i = thread; i < all; i += kThreads) atomicAdd(&groups[ids[i]].count, 1);
  __syncthreads();
  if (warp == 0) {
    const int count = find_places(groups, experts, piece);
    if (lane == 0) *item_count = count;
  }
  __syncthreads();
  for (int expert = warp; expert < experts; expert += kThreads / kWarp) {
    const Group group = groups[expert];
    for (int i = lane; i * piece < group.count; i += kWarp) {
      const int left = group.count - i * piece;
      int32_t* to = items + 3 * (group.item + i);
      to[0] = expert, to[1] = group.place + i * piece, to[2] = left < piece ? left : piece;
    }
  }
  __syncthreads();
  for (int i = thread; i < all; i += kThreads) lines[atomicAdd(&groups[ids[i]].place, 1)] = i;
}

// out[line] = x[row] * weight. out is [rows * used, width]. Grid: (width / 1024 rounded up, rows), blocks of 256
// threads.
KERNEL(256, weigh, const float* __restrict__ x, const float* __restrict__ weights, int32_t used, int32_t width,
       const int32_t* rows, float* __restrict__ out) {
  const int row = blockIdx.y, first = kPiece * blockIdx.x + 4 * threadIdx.x;
  if (row >= *rows) return;
  for (int i = first; i < first + 4 && i < width; i++)
    for (int rank = 0; rank < used; rank++)
      out[line(row * used + rank, width) + i] = mul(x[line(row, width) + i], weights[row * used + rank]);
}

// out = the sum over ranks of x[line] * weight, or of x[line] if weights are null. x is [rows * used, width]. Grid:
// (width / 1024 rounded up, rows), blocks of 256 threads.
KERNEL(256, combine, const float* __restrict__ x, const float* __restrict__ weights, int32_t used, int32_t width,
       const int32_t* rows, float* __restrict__ out) {
  const int row = blockIdx.y, first = kPiece * blockIdx.x + 4 * threadIdx.x;
  if (row >= *rows) return;
  for (int i = first; i < first + 4 && i < width; i++) {
    float sum = 0.0f;
    for (int rank = 0; rank < used; rank++)
      sum = fma(x[line(row * used + rank, width) + i], weights == nullptr ? 1.0f : weights[row * used + rank], sum);
    out[line(row, width) + i] = sum;
  }
}

}  // namespace llamaclust::cuda
