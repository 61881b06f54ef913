// Collective operations of a warp's lanes, copies in the background, and products of bytes.
#pragma once

namespace shim {

// Operands of a lane and a way to compute all results from all operands: one collective operation.
template <class Result, class Operands, class F>
Result together(uint32_t mask, const Operands& operands, F, Site site) {
  static_assert(sizeof(Operands) <= kOperandBytes && sizeof(Result) <= kResultBytes);
  memcpy(current->operands, &operands, sizeof operands);
  collective(mask, [](const Lanes& lanes) { F{}(lanes); }, site);
  Result result;
  memcpy(&result, current->result, sizeof result);
  return result;
}

template <class T>
struct Shuffle {
  T value;
  int source;
};

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  const auto all = [](const Lanes& lanes) {
    for (int i = 0; i < 32; i++) {
      if ((lanes.mask >> i & 1) == 0) continue;
      Shuffle<T> of_lane, of_source;
      memcpy(&of_lane, lanes.first[i].operands, sizeof of_lane);
      if ((lanes.mask >> of_lane.source & 1) == 0)
        fail("a shuffle from lane " + std::to_string(of_lane.source) + ", which is not there");
      memcpy(&of_source, lanes.first[of_lane.source].operands, sizeof of_source);
      memcpy(lanes.first[i].result, &of_source.value, sizeof(T));
    }
  };
  return together<T>(mask, Shuffle<T>{value, source}, all, site);
}

inline uint32_t ballot(uint32_t mask, bool vote, Site site) {
  const auto all = [](const Lanes& lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++)
      if ((lanes.mask >> i & 1) != 0 && lanes.first[i].operands[0] != 0) votes |= uint32_t{1} << i;
    for (int i = 0; i < 32; i++)
      if ((lanes.mask >> i & 1) != 0) memcpy(lanes.first[i].result, &votes, sizeof votes);
  };
  return together<uint32_t>(mask, static_cast<uint8_t>(vote), all, site);
}

template <int rows, int k, class A>
void multiply(int32_t* d, const A* a, const int32_t* b, Site site) {
  struct Result {
    int32_t d[4];
  };
  Fragments fragments{};
  memcpy(fragments.d, d, rows);  // a quarter of them int32
  memcpy(fragments.a, a, static_cast<size_t>(rows * k / 32));
  memcpy(fragments.b, b, static_cast<size_t>(k / 4));
  constexpr bool is_unsigned = static_cast<A>(-1) > 0;
  const auto all = [](const Lanes& lanes) { multiply_fragments(lanes, rows, k, is_unsigned); };
  const Result result = together<Result>(0xffffffff, fragments, all, site);
  memcpy(d, result.d, rows);
}

}  // namespace shim

inline void __syncthreads(SHIM_HERE) { shim::wait_for_block({file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffff, SHIM_HERE) {
  shim::collective(mask, [](const shim::Lanes&) {}, {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, SHIM_HERE) { return shim::ballot(mask, vote, {file, line}); }
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SHIM_HERE) {
  const int lane = shim::current->lane;
  return shim::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int with, int width = 32, SHIM_HERE) {
  const int lane = shim::current->lane, other = lane ^ with;
  return shim::shuffle(mask, value, other / width > lane / width ? lane : other, {file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, SHIM_HERE) {
  const int lane = shim::current->lane, other = lane + static_cast<int>(by);
  return shim::shuffle(mask, value, other / width > lane / width ? lane : other, {file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, SHIM_HERE) {
  const int lane = shim::current->lane, other = lane - static_cast<int>(by);
  return shim::shuffle(mask, value, other < lane / width * width ? lane : other, {file, line});
}

namespace llamaclust::cuda {

inline float half_to_float(uint16_t h) {
#if defined(__aarch64__)
  return static_cast<float>(shim::bits_as<__fp16>(h));
#else
  return static_cast<float>(shim::bits_as<_Float16>(h));
#endif
}
inline uint16_t float_to_half(float x) {
#if defined(__aarch64__)
  return shim::bits_as<uint16_t>(static_cast<__fp16>(x));
#else
  return shim::bits_as<uint16_t>(static_cast<_Float16>(x));
#endif
}

inline int32_t dp2a_low(int32_t a, int32_t b, int32_t c) {
  for (int i = 0; i < 2; i++) c += static_cast<int16_t>(a >> 16 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline int32_t dp2a_high(int32_t a, int32_t b, int32_t c) { return dp2a_low(a, b >> 16, c); }

template <class A>
int32_t dp4a(A a, int32_t b, int32_t c) {
  constexpr bool is_unsigned = static_cast<A>(-1) > 0;
  for (int i = 0; i < 4; i++) {
    const uint8_t byte = static_cast<uint8_t>(static_cast<uint32_t>(a) >> 8 * i);
    c += (is_unsigned ? byte : static_cast<int8_t>(byte)) * static_cast<int8_t>(static_cast<uint32_t>(b) >> 8 * i);
  }
  return c;
}

template <class A>
void mma_m16n8k32(int32_t (&d)[4], const A (&a)[4], const int32_t (&b)[2], SHIM_HERE) {
  shim::multiply<16, 32>(d, a, b, {file, line});
}
inline void mma_m16n8k16(int32_t (&d)[4], const int32_t (&a)[2], const int32_t (&b)[1], SHIM_HERE) {
  shim::multiply<16, 16>(d, a, b, {file, line});
}
template <class A>
void mma_m8n8k16(int32_t& d0, int32_t& d1, A a, int32_t b, SHIM_HERE) {
  int32_t d[2] = {d0, d1};
  shim::multiply<8, 16>(d, &a, &b, {file, line});
  d0 = d[0], d1 = d[1];
}

struct SharedOperand {
  const uint8_t* at;
  int group_bytes;
  SharedOperand operator+(int bytes) const { return {at + bytes, group_bytes}; }
};
inline SharedOperand shared_operand(const void* shared, int group_bytes) {
  return {static_cast<const uint8_t*>(shared), group_bytes};
}

// A warp's sixteen rows of it. The registers hold no sum before the wait.
template <size_t count, class A>
void multiply_k32_by_four(int32_t (&d)[count], const A (&a)[4], SharedOperand b, int adds, SHIM_HERE) {
  if (reinterpret_cast<uintptr_t>(b.at) % 16 != 0 || b.group_bytes % 16 != 0)
    shim::fail("an operand in shared memory that is not aligned to 16 bytes");
  auto& all = shim::current->products;
  size_t place = 0;
  while (place < all.size() && all[place].registers != d) place++;
  if (place == all.size()) all.push_back({d, {d, d + count}, 0});
  all[place].group = shim::current->groups;
  const int lane = shim::current->lane;
  for (int g = 0; g < static_cast<int>(count) / 4; g++) {
    int32_t sums[4] = {0, 0, 0, 0}, words[2];
    if (adds != 0) memcpy(sums, &all[place].sums[4 * g], sizeof sums);
    for (int half = 0; half < 2; half++)
      memcpy(&words[half], b.at + g * b.group_bytes + 128 * half + 4 * lane, sizeof words[half]);
    shim::multiply<16, 32>(sums, a, words, {file, line});
    memcpy(&shim::current->products[place].sums[4 * g], sums, sizeof sums);
  }
  for (int32_t& one : d) one = 0x5a5a5a5a;
}
inline void warpgroup_begin() {}
inline void warpgroup_commit() { shim::current->groups++; }
template <int groups>
void warpgroup_wait() {
  std::erase_if(shim::current->products, [](const shim::Products& one) {
    if (one.group >= shim::current->groups - groups) return false;
    memcpy(one.registers, one.sums.data(), sizeof(int32_t) * one.sums.size());
    return true;
  });
}
inline void publish_shared() {}

template <int barrier, int threads>
void barrier_wait(SHIM_HERE) {
  shim::arrive(barrier, threads, true, {file, line});
}
template <int barrier, int threads>
void barrier_arrive(SHIM_HERE) {
  shim::arrive(barrier, threads, false, {file, line});
}

inline void barrier_wait_at(int barrier, int threads, SHIM_HERE) { shim::arrive(barrier, threads, true, {file, line}); }
inline void barrier_arrive_at(int barrier, int threads, SHIM_HERE) { shim::arrive(barrier, threads, false, {file, line}); }

// A card would forgive an address where nothing is; such a request is a miscalculation.
inline void prefetch(const void* p) { static_cast<void>(*static_cast<const volatile uint8_t*>(p)); }

// Copied when it is waited for, so that who does not wait reads what was there before.
template <size_t bytes>
void copy_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0)
    shim::fail("an asynchronous copy that is not aligned to " + std::to_string(bytes) + " bytes");
  shim::current->pending.push_back({shared, global, bytes});
}
struct SharedAddress {
  uint8_t* bytes;
  SharedAddress operator+(int by) const { return {bytes + by}; }
};
inline SharedAddress shared_address(void* shared) { return {static_cast<uint8_t*>(shared)}; }
inline void copy_async_16(SharedAddress to, const void* global) { copy_async<16>(to.bytes, global); }
inline void copy_async_16(void* shared, const void* global) { copy_async<16>(shared, global); }
inline void copy_async_4(SharedAddress to, const void* global) { copy_async<4>(to.bytes, global); }
inline void copy_async_4(void* shared, const void* global) { copy_async<4>(shared, global); }
inline void copy_async_commit() {
  shim::current->committed.push_back(std::move(shim::current->pending));
  shim::current->pending.clear();
}
template <int groups>
void copy_async_wait() {
  auto& committed = shim::current->committed;
  while (committed.size() > groups) {
    for (const shim::Copy& copy : committed.front()) memcpy(copy.to, copy.from, copy.bytes);
    committed.erase(committed.begin());
  }
}

inline int dynamic_shared_bytes() { return static_cast<int>(shim::dynamic_bytes()); }
inline void arrival_init(SharedAddress arrival, int others = 0) { shim::init_arrival(arrival.bytes, others); }
inline void copy_async_arrive(SharedAddress arrival) { shim::arrive_with_copies(arrival.bytes); }
inline bool is_last(SharedAddress counter, int of) {
  int32_t& count = *reinterpret_cast<int32_t*>(counter.bytes);
  count = count + 1 == of ? 0 : count + 1;
  return count == 0;
}
inline void arrival_announce(SharedAddress arrival, int bytes) {
  shim::announce(arrival.bytes, static_cast<size_t>(bytes));
}
inline void copy_bulk(SharedAddress to, const void* global, int bytes, SharedAddress arrival) {
  shim::request_bulk(arrival.bytes, {to.bytes, global, static_cast<size_t>(bytes)});
}
inline void arrival_wait(SharedAddress arrival, int parity, SHIM_HERE) {
  shim::wait_for_arrival(arrival.bytes, parity, {file, line});
}

}  // namespace llamaclust::cuda
