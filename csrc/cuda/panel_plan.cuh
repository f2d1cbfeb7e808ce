// From an index to a plan: which source rows each tile keeps resident chunk by chunk, which warp multiplies which
// panel, and the fragments in the order in which a warp reads them. Nothing of it comes back to the host.
#pragma once

#include "panel_shape.cuh"
#include "panel_tile.cuh"

namespace sparsekit::cuda::panel {
namespace {

constexpr int kPlanThreads = 512;
constexpr int kPlanWarps = kPlanThreads / kWarp;
static_assert(kPlanWarps >= kMaxWarps, "each warp of the plan lays out the fragments of one warp of the product");

// The sum of `value` over this lane and the earlier ones.
SPARSEKIT_DEVICE int inclusive_sum(int value) {
  const int lane = int(threadIdx.x % kWarp);
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int earlier = shuffle_up(value, distance);
    if (lane >= distance) value += earlier;
  }
  return value;
}

// The set of units that a tile uses, and the rank of each among them.
struct UnitSet {
  unsigned* bits;  // [words]
  int* before;     // [words] members in earlier words
  int words;

  SPARSEKIT_DEVICE void insert(int unit) { atomic_or(bits + unit / 32, 1u << (unit % 32)); }
  SPARSEKIT_DEVICE bool holds(int unit) const { return bits[unit / 32] >> (unit % 32) & 1u; }
  SPARSEKIT_DEVICE int rank(int unit) const {
    return before[unit / 32] + __popc(bits[unit / 32] & ((1u << (unit % 32)) - 1u));
  }
  // All threads of the block; `sums` has kPlanWarps elements. Returns the number of members.
  SPARSEKIT_DEVICE int count(int* sums) {
    const int share = int(ceil_div(words, kPlanThreads)), self = int(threadIdx.x), warp = self / kWarp;
    const int begin = min(self * share, words), end = min(begin + share, words);
    int own = 0;
    for (int w = begin; w < end; ++w) own += __popc(bits[w]);
    int earlier = inclusive_sum(own);
    if (self % kWarp == kWarp - 1) sums[warp] = earlier;
    __syncthreads();
    earlier -= own;
    int all = 0;
    for (int w = 0; w < kPlanWarps; ++w) {
      earlier += w < warp ? sums[w] : 0;
      all += sums[w];
    }
    for (int w = begin; w < end; ++w) {
      before[w] = earlier;
      earlier += __popc(bits[w]);
    }
    __syncthreads();
    return all;
  }
};

// One block per tile; fills everything of the plan but the fragments.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(Lists l, Source source, Plan plan) {
  SharedArena arena;
  const int units = l.all_units(), words = int(ceil_div(units, 32)), tile_panels = l.tile_panels();
  UnitSet used{arena.take<unsigned>(words), arena.take<int>(words), words};
  int* sums = arena.take<int>(kPlanWarps);
  int* lengths = arena.take<int>(tile_panels);
  const int tile = int(blockIdx.x), self = int(threadIdx.x), group = tile / l.tiles;
  const int first = tile % l.tiles * tile_panels, panels = min(tile_panels, l.panels - first);
  const int64_t global = int64_t{group} * l.panels + first;
  const int32_t* starts = l.starts + global * l.starts_stride;
  const auto start = [&](int panel) { return ldg(starts + int64_t{panel} * l.starts_stride); };
  const int begin = start(0), end = start(panels);
  for (int w = self; w < words; w += kPlanThreads) used.bits[w] = 0;
  __syncthreads();
#pragma unroll 4
  for (int e = begin + self; e < end; e += kPlanThreads) used.insert(ldg(l.columns + e));
  for (int i = self; i < panels; i += kPlanThreads) lengths[i] = start(i + 1) - start(i);
  __syncthreads();
  const int members = used.count(sums), chunks = l.chunks(members);
  if (self == 0) plan.used[tile] = members;

  // Where the rows of each used unit start in the source.
  for (int u = self; u < units; u += kPlanThreads) {
    if (!used.holds(u)) continue;
    const int tap = u / l.units, r = tap / l.taps_w, s = tap % l.taps_w;
    const int line = (l.flipped ? l.taps / l.taps_w - 1 - r : r) * l.dilation;
    const int64_t feature = (int64_t{s} * l.groups + group) * source.padded + ((u - tap * l.units) << l.unit_shift);
    plan.rows[int64_t{tile} * units + used.rank(u)] = int32_t(feature * source.plane() + int64_t{line} * source.octets);
  }
#pragma unroll 4
  for (int e = begin + self; e < end; e += kPlanThreads) plan.place[e] = used.rank(ldg(l.columns + e));

  // Where each chunk begins in each panel's list: columns and so places ascend within a panel.
  const int width = l.max_chunks + 1;
  for (int i = self; i < panels * (chunks + 1); i += kPlanThreads) {
    const int panel = i / (chunks + 1), chunk = i % (chunks + 1);
    int low = start(panel), high = start(panel + 1);
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (used.rank(ldg(l.columns + middle)) < chunk * l.chunk_units) low = middle + 1;
      else high = middle;
    }
    plan.bounds[(global + panel) * width + chunk] = low;
  }
  // Panels are dealt to warps longest first, to and fro.
  int32_t* owner = plan.owner + int64_t{tile} * tile_panels;
  for (int i = self; i < tile_panels; i += kPlanThreads) {
    int rank = i;  // places beyond the last panel stay empty
    if (i < panels) {
      rank = 0;
      for (int j = 0; j < panels; ++j) rank += lengths[j] > lengths[i] || (lengths[j] == lengths[i] && j < i);
    }
    const int round = rank / l.warps, nth = rank % l.warps;
    owner[(round % 2 ? l.warps - 1 - nth : nth) * l.per_warp + round] = i < panels ? first + i : -1;
  }
  __syncthreads();

  // A warp's fragments follow each other in the order in which it multiplies them. A tile has room from the position
  // that holds if each earlier panel's list of a chunk wastes a whole fragment.
  const int warp = self / kWarp, lane = self % kWarp, steps = warp < l.warps ? chunks * l.per_warp : 0;
  const auto fragments = [&](int step) {
    const int panel = step < steps ? owner[warp * l.per_warp + step % l.per_warp] : -1;
    if (panel < 0) return 0;
    const int32_t* bounds = plan.bounds + (global + panel - first) * width + step / l.per_warp;
    return int(ceil_div((bounds[1] - bounds[0]) << l.unit_shift, l.depth));
  };
  int all = 0;
  for (int step = lane; step < steps; step += kWarp) all += fragments(step);
  all = inclusive_sum(all);
  if (lane == kWarp - 1) sums[warp] = all;
  __syncthreads();
  if (warp >= l.warps) return;
  int position = int((int64_t{begin} << l.unit_shift) / l.depth + global * l.max_chunks);
  for (int w = 0; w < warp; ++w) position += sums[w];
  int32_t* segments = plan.segments + (int64_t{tile} * l.warps + warp) * l.stream_length();
  for (int step = lane; step - lane < steps; step += kWarp) {
    const int own = fragments(step), until = inclusive_sum(own);
    if (step < steps) segments[step] = position + until - own;
    position += shuffle(until, kWarp - 1);
  }
  if (lane == 0) segments[steps] = position;
}

// ---- fragments ----

// The registers of mma operand b that hold, for k = 2t + 8h or (tf32) t + 4h, column lane / 4 of a fragment.
template <class T, class Weight>
SPARSEKIT_DEVICE uint32_t pack_weights(const Weight& weight, int lane, int h) {
  const int t = lane % 4;
  if constexpr (sizeof(T) == 2) return pack2(weight(2 * t + 8 * h), weight(2 * t + 8 * h + 1));
  else return to_tf32(weight(t + 4 * h));
}

// One warp per panel and chunk. Rows whose number within the chunk leaves the same remainder by `classes` lie in the
// same banks, so a fragment is lines of one row of each class. Of a class with more members than there are lines the
// rest takes the places of others that have fewer; empty places read a row of zeros of their class.
template <class T, int kTokens>
__global__ void __launch_bounds__(128, 8) pack_kernel(Lists l, Plan plan, const T* values) {
  using Layout = TileLayout<T, kTokens>;
  const int lane = int(threadIdx.x % kWarp), places = l.tile_panels();
  const int64_t job = int64_t{blockIdx.x} * 4 + threadIdx.x / kWarp;
  const int chunk = int(job % l.max_chunks), place = int(job / l.max_chunks % places);
  const int64_t tile = job / l.max_chunks / places;
  if (tile >= l.all_tiles() || chunk >= l.chunks(plan.used[tile])) return;
  const int panel = plan.owner[tile * places + place];
  if (panel < 0) return;
  const int64_t global = tile / l.tiles * l.panels + panel;
  const int32_t* bounds = plan.bounds + global * (l.max_chunks + 1) + chunk;
  const int begin = bounds[0], end = bounds[1];
  const int warp = place / l.per_warp, step = chunk * l.per_warp + place % l.per_warp;
  const int64_t fragment = plan.segments[(tile * l.warps + warp) * l.stream_length() + step];
  uint16_t* slots = plan.slots + fragment * l.depth;
  int32_t* origin = plan.origin + fragment * l.depth;

  const int rows = (end - begin) << l.unit_shift, padded = int(round_up(rows, l.depth));
  for (int i = lane; i < padded; i += kWarp) {
    slots[i] = uint16_t(Layout::slot(l.chunk_rows() + i % kZeroRows));
    origin[i] = -1;
  }
  constexpr int kMaxClasses = 8;
  const int classes = max(1, l.classes >> l.unit_shift), lines = (padded >> l.unit_shift) / classes;
  int members[kMaxClasses] = {}, seen[kMaxClasses] = {};
  for (int e0 = begin; e0 < end; e0 += kWarp) {
    const int own = e0 + lane < end ? plan.place[e0 + lane] % classes : -1;
#pragma unroll
    for (int c = 0; c < kMaxClasses; ++c) members[c] += __popc(ballot(own == c));
  }
  __syncwarp();
  for (int e0 = begin; e0 < end; e0 += kWarp) {
    const int e = e0 + lane, own = e < end ? plan.place[e] % classes : -1;
    int rank = 0;
#pragma unroll
    for (int c = 0; c < kMaxClasses; ++c) {
      const unsigned same = ballot(own == c);
      if (own == c) rank = seen[c] + __popc(same & ((1u << lane) - 1u));
      seen[c] += __popc(same);
    }
    if (own < 0) continue;
    int position = rank < lines ? rank * classes + own : -1;
    if (position < 0) {
      int order = 0;  // among those that are too many, by rank and class
#pragma unroll
      for (int c = 0; c < kMaxClasses; ++c) order += max(0, min(members[c], rank + (c < own ? 1 : 0)) - lines);
      for (int line = lines - 1; position < 0; --line) {
#pragma unroll
        for (int c = 0; c < kMaxClasses; ++c)
          if (c < classes && members[c] <= line && order-- == 0) position = line * classes + c;
      }
    }
    const int unit = plan.place[e] - chunk * l.chunk_units;
    for (int d = 0; d < l.unit_rows(); ++d) {
      slots[(position << l.unit_shift) + d] = uint16_t(Layout::slot((unit << l.unit_shift) + d));
      origin[(position << l.unit_shift) + d] = (e << l.unit_shift) + d;
    }
  }
  if (!plan.weights) return;
  __syncwarp();
  const int across = l.flipped ? 1 : l.unit_rows(), along = l.flipped ? l.width : 1;  // strides within a block
  for (int f = 0; f * l.depth < padded; ++f) {
    uint32_t* packed = plan.weights + ((fragment + f) * kWarp + lane) * (l.width / 4);
    for (int i = 0; i < l.width / 4; ++i) {
      const int output = lane / 4 + i / 2 * 8;
      const auto weight = [&](int k) {
        const int from = origin[f * l.depth + k];
        if (from < 0) return from_float<T>(0.0f);
        const int entry = from >> l.unit_shift, row = from & (l.unit_rows() - 1);
        const int64_t block = l.perm ? ldg(l.perm + entry) : entry;
        return ldg(values + (block * l.width << l.unit_shift) + output * across + row * along);
      };
      packed[i] = pack_weights<T>(weight, lane, i % 2);
    }
  }
}

// Fills the plan of a product on tiles of kTokens tokens; values are null where no weights are needed.
template <class T, int kTokens>
cudaError_t queue_plan(const Lists& l, const Source& source, const Plan& plan, const void* values, void* stream) {
  const int64_t words = ceil_div(l.all_units(), 32);
  const size_t shared = arena_bytes<unsigned>(words) + arena_bytes<int>(words) + arena_bytes<int>(kPlanWarps) +
                        arena_bytes<int>(l.tile_panels());
  const cudaError_t error = launch(plan_kernel, unsigned(l.all_tiles()), kPlanThreads, shared, stream, l, source, plan);
  if (error != cudaSuccess) return error;
  const int64_t jobs = int64_t{l.all_tiles()} * l.tile_panels() * l.max_chunks;
  if (ceil_div(jobs, 4) > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(pack_kernel<T, kTokens>, unsigned(ceil_div(jobs, 4)), 128, 0, stream, l, plan,
                static_cast<const T*>(values));
}

}  // namespace
}  // namespace sparsekit::cuda::panel
