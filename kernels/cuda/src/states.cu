// Steps that read and update a state of each sequence (model/steps/states.py). A layer's states are [blocks][floats].
#include "elementwise/lines.cuh"
#include "math.cuh"
#include "matmul/float_types.cuh"
#include "sequences.cuh"

namespace llamaclust::cuda {
namespace {

constexpr int kMostKept = 15;  // Maximum number of rows in the state of a convolution.

// Rows of x before a row of its sequence: those of the batch, and before them those of the state.
struct History {
  const float *x, *state;  // A null state is all zeros.
  int begin, kept, width;

  DEVICE float at(int row, int channel) const {
    if (row >= begin) return x[line(row, width) + channel];
    return state == nullptr ? 0.0f : state[line(row - begin + kept, width) + channel];
  }
};

DEVICE const float* state_before(const int32_t* before, int sequence, const float* states, int floats) {
  return before[sequence] < 0 ? nullptr : states + line(before[sequence], floats);
}

}  // namespace

// out[row] = the sum over taps of x[row] and the rows before it, with weights [width, taps] in tiles. Grid: (width /
// 256 rounded up, rows), blocks of 256 threads.
#define CONVOLVE(Type)                                                                                                \
  KERNEL(256, convolve_##Type, const float* __restrict__ x, const uint8_t* __restrict__ tiles, int32_t tile_bytes,    \
         const float* bias, int32_t taps, int32_t width, STATE_PARAMETERS, float* __restrict__ out) {                 \
    const int row = blockIdx.y, channel = 256 * blockIdx.x + threadIdx.x;                                             \
    if (row >= header[0] || channel >= width) return;                                                                 \
    const int sequence = sequence_of(row, sequence_starts, header[1]), kept = taps - 1;                               \
    const float* state = state_before(before, sequence, states, kept * width);                                        \
    const History history{x, state, sequence_starts[sequence], kept, width};                                          \
    const uint8_t* weight = tiles + line(channel / 16, tile_bytes) + channel % 16 * Type::kBytes;                      \
    float sum = bias == nullptr ? 0.0f : bias[channel];                                                               \
    for (int t = 0; t < taps; t++, weight += kColumnBytes<Type>) {                                                    \
      const float value = history.at(row - kept + t, channel), by = Type::value(weight);                              \
      sum = t == 0 && bias == nullptr ? mul(value, by) : fma(value, by, sum);                                         \
    }                                                                                                                 \
    out[line(row, width) + channel] = sum;                                                                            \
  }
CONVOLVE(F32)
CONVOLVE(F16)
CONVOLVE(BF16)

// Writes the last rows of x to the state of a convolution, after the convolution. A thread has a channel of a sequence,
// because the state that it reads may be one that it writes. Grid: (width / 256 rounded up, sequences), blocks of 256
// threads.
KERNEL(256, keep_rows, const float* __restrict__ x, int32_t taps, int32_t width, STATE_PARAMETERS) {
  const int sequence = blockIdx.y, channel = 256 * blockIdx.x + threadIdx.x, kept = taps - 1;
  if (sequence >= header[1] || channel >= width) return;
  const StatePlaces places STATE_PLACES;
  const float* state = state_before(places.before, sequence, states, kept * width);
  float held[kMostKept];
  for (int j = 0; j < kept; j++) held[j] = state == nullptr ? 0.0f : state[line(j, width) + channel];
  const int begin = sequence_starts[sequence];
  for (int i = places.starts[sequence]; i < places.starts[sequence + 1]; i++)
    for (int j = 0; j < kept; j++) {
      const int row = places.rows[i] - kept + 1 + j;
      const float value = row >= begin ? x[line(row, width) + channel] : held[row - begin + kept];
      states[line(places.blocks[i] * kept + j, width) + channel] = value;
    }
}

namespace {

constexpr int kDeltaChannels = 32;

}  // namespace

// The gated delta rule. A thread has a value channel of a head of a sequence, with its part of the state in shared
// memory, and computes keys in order. Pieces are 32 of a head's `values` channels. Grid: (heads * pieces, sequences),
// blocks of 32 threads. Shared memory: keys * 32 floats.
KERNEL(32, delta_rule, const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
       const float* __restrict__ decay, const float* __restrict__ beta, int32_t heads, int32_t key_heads, int32_t tiled,
       int32_t keys, int32_t values, int32_t decays, STATE_PARAMETERS, float* __restrict__ out) {
  const int pieces = (values + kDeltaChannels - 1) / kDeltaChannels, sequence = blockIdx.y;
  const int head = blockIdx.x / pieces, channel = blockIdx.x % pieces * kDeltaChannels + threadIdx.x;
  if (sequence >= header[1] || channel >= values) return;
  const StatePlaces places STATE_PLACES;
  const int key_head = tiled != 0 ? head % key_heads : head / (heads / key_heads), floats = heads * keys * values;
  const float* read = state_before(places.before, sequence, states, floats);
  float* state = reinterpret_cast<float*>(DYNAMIC_SHARED) + threadIdx.x;  // Every 32nd float.
  const size_t place = line(head * keys, values) + channel;
  for (int key = 0; key < keys; key++)
    state[kDeltaChannels * key] = read == nullptr ? 0.0f : read[place + line(key, values)];
  int row = sequence_starts[sequence];
  for (int i = places.starts[sequence]; i < places.starts[sequence + 1]; i++) {
    for (; row <= places.rows[i]; row++) {
      const float *own_q = q + line(row, key_heads * keys) + key_head * keys, *own_k = k + (own_q - q);
      const bool per_key = decays != heads;
      const float* own_decay = decay + line(row, decays) + (per_key ? head * keys : head);
      float seen = 0.0f, result = 0.0f;
      for (int key = 0; key < keys; key++)
        seen = fma(state[kDeltaChannels * key], mul(own_decay[per_key ? key : 0], own_k[key]), seen);
      const size_t at = line(row, heads * values) + head * values + channel;
      const float delta = mul(sub(v[at], seen), beta[line(row, heads) + head]);
      for (int key = 0; key < keys; key++) {
        float& number = state[kDeltaChannels * key];
        number = fma(own_k[key], delta, mul(number, own_decay[per_key ? key : 0]));
        result = fma(number, own_q[key], result);
      }
      out[at] = result;
    }
    float* to = states + line(places.blocks[i], floats) + place;
    for (int key = 0; key < keys; key++) to[line(key, values)] = state[kDeltaChannels * key];
  }
}

// The scan of Mamba 2. A thread has a channel of a head of a sequence, with its part of the state in shared memory, and
// computes the state's values in order. Rows of x have the channels of all heads, then b and c of each group. Pieces
// are blockDim.x of a head's `channels`. Grid: (heads * pieces, sequences). Shared memory: state_size * blockDim.x
// floats.
KERNEL(32, scan, const float* __restrict__ x, const float* __restrict__ dt, const float* __restrict__ bias,
       const float* __restrict__ rates, const float* __restrict__ skips, int32_t heads, int32_t channels, int32_t groups,
       int32_t state_size, STATE_PARAMETERS, float* __restrict__ out) {
  const int stride = blockDim.x, pieces = (channels + stride - 1) / stride, sequence = blockIdx.y;
  const int head = blockIdx.x / pieces, channel = blockIdx.x % pieces * stride + threadIdx.x;
  if (sequence >= header[1] || channel >= channels) return;
  const StatePlaces places STATE_PLACES;
  const int group = head / (heads / groups), inner = heads * channels, width = inner + 2 * groups * state_size;
  const int floats = inner * state_size;
  const float* read = state_before(before, sequence, states, floats);
  float* state = reinterpret_cast<float*>(DYNAMIC_SHARED) + threadIdx.x;
  const size_t place = line(head * state_size, channels) + channel;
  for (int k = 0; k < state_size; k++) state[stride * k] = read == nullptr ? 0.0f : read[place + line(k, channels)];
  int row = sequence_starts[sequence];
  for (int i = places.starts[sequence]; i < places.starts[sequence + 1]; i++) {
    for (; row <= places.rows[i]; row++) {
      const float* own = x + line(row, width);
      const float *b = own + inner + group * state_size, *c = b + groups * state_size;
      const float step = softplus(add(dt[line(row, heads) + head], bias[head])), decay = exp(mul(step, rates[head]));
      const float input = own[head * channels + channel], added = mul(input, step);
      float sum = 0.0f;
      for (int k = 0; k < state_size; k++) {
        float& number = state[stride * k];
        number = fma(number, decay, mul(b[k], added));
        sum = fma(number, c[k], sum);
      }
      out[line(row, inner) + head * channels + channel] = fma(input, skips[head], sum);
    }
    float* to = states + line(places.blocks[i], floats) + place;
    for (int k = 0; k < state_size; k++) to[line(k, channels)] = state[stride * k];
  }
}

// out = exp(softplus(x + bias) * weight), with one weight for each of `heads` equal parts; out may be x. Grid: (width /
// 256 rounded up, rows), blocks of 256 threads.
KERNEL(256, decay, const float* x, const float* __restrict__ weight, const float* __restrict__ bias, int32_t width,
       int32_t heads, const int32_t* rows, float* out) {
  const int row = blockIdx.y, channel = 256 * blockIdx.x + threadIdx.x;
  if (row >= *rows || channel >= width) return;
  const float value = softplus(add(x[line(row, width) + channel], bias[channel]));
  out[line(row, width) + channel] = exp(mul(value, weight[channel / (width / heads)]));
}

}  // namespace llamaclust::cuda
