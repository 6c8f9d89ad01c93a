#include "batch.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "scratch.h"

namespace dts_fast::cpu {

namespace {

constexpr int64_t kElementSize[kDTypes] = {4, 2, 2};

// Rows of one call that are in flight together: as many as leave their inputs, as they are multiplied and packed, in
// the cache that is large enough for this processor, but enough that the weights, which are read again for each such
// part, are not what takes the time. On packed weights a range of k of the inputs serves a whole block of outputs, so
// that the third level does.
int64_t rows_in_flight(const Problem& p, const Kernels& kernels) {
  const int64_t inputs = p.panels ? 1 << 21 : kernels.bytes_in_flight / kernels.row_size[p.dtype];
  constexpr int64_t kLeast = 64, kMost = 512;
  if (p.ids) return kMost;
  return std::clamp(inputs / std::max<int64_t>(p.k, 1) / 8 * 8, kLeast, kMost);
}

// Outputs of a block, whose sums of a few rows stay in the first-level cache; more for one row, whose tables then serve
// more outputs.
constexpr int64_t kBlock = 64;
constexpr int64_t kBlockOfOne = 256;
// The same for many rows of a packed base.
constexpr int64_t kBlockOfPanels = 256, kRowsOfPanels = 48;
// Rows that are read side by side and lie a multiple of so many bytes apart would share a few of the first-level
// cache's 64 sets; they get so many more between them.
constexpr int64_t kAlike = 1024, kApart = 64;
// Pages and rows of one task of a shrink.
constexpr int64_t kTaskPages = 8;
constexpr int64_t kTaskRows = 32;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows with the same slot.
struct Group {
  int64_t first, rows;  // in the sorted order
  int64_t page, pages;  // its pages, in the list of all groups'
  int64_t h;            // offset of its h [rows, 16 pages]
};

struct Task {
  int64_t group, row, rows, page, pages;
};

class Batch {
 public:
  Batch(const Problem& p, const Kernels& kernels, int64_t first_row, int64_t rows)
      : p_(p),
        kernels_(kernels),
        rows_(rows),
        row_size_(kernels.row_size[p.dtype]),
        stride_(stride_of(p, kernels, rows)) {
    const int32_t* const ids = p.bank.slot_ids + first_row;
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    const int64_t size = kElementSize[p.dtype];
    for (int64_t row : order) {
      if (p.ids) {
        ids_.push_back(p.ids[first_row + row]);
      } else {
        x_.push_back(static_cast<const char*>(p.x) + (first_row + row) * p.x_stride * size);
      }
      y_.push_back(static_cast<char*>(p.y) + (first_row + row) * p.y_stride * size);
    }
    for (int64_t m = 0; m < rows;) {
      const int32_t slot = ids[order[m]];
      int64_t end = m + 1;
      while (end < rows && ids[order[end]] == slot) ++end;
      const int64_t page = pages_.size();
      for (int64_t i = 0; slot >= 0 && i < p.bank.list_length; ++i) {
        const int64_t at = slot * p.bank.list_length + i;
        if (p.bank.slot_pages[at] < 0) break;
        pages_.push_back({p.bank.pages + p.bank.slot_pages[at] * p.bank.page_nbytes, p.bank.slot_weights[at]});
      }
      const int64_t pages = static_cast<int64_t>(pages_.size()) - page;
      if (pages) {
        groups_.push_back({m, end - m, page, pages, h_size_});
        h_size_ += (end - m) * pages * kTile;
      }
      m = end;
    }
    // V is [K, r] and U [N, r] of the layer; the transposed op has them change places.
    const int64_t v_size = p.transpose ? p.n : p.k;
    const Factor v = {kVOffset, kVLevelsOffset, p.transpose};
    const Factor u = {kVOffset + round_up(v_size, kTile) / kTile * kTileBytes, kULevelsOffset, p.transpose};
    shrink_ = p.transpose ? u : v;
    expand_ = p.transpose ? v : u;
  }

  void run(int threads, const ParallelFor& parallel_for) {
    const bool as_is = p_.ids || (kElementSize[p_.dtype] == row_size_ && p_.k == stride_ && contiguous());
    const Scratch read(as_is ? 0 : floats(rows_ * stride_));
    if (as_is) {
      read_ = p_.ids ? nullptr : static_cast<const char*>(x_[0]);
    } else {
      char* const out = reinterpret_cast<char*>(read.get());
      const auto body = [&](int64_t begin, int64_t end) { read_rows(begin, end, out); };
      if (rows_ * p_.k < kSmall) {
        body(0, rows_);
      } else {
        parallel_for(rows_, body);
      }
      read_ = out;
    }
    make_tasks(threads);
    const int64_t unit = p_.panels ? kPanel : kTile;
    const int64_t tiles = round_up(p_.n, unit) / unit;
    const auto inputs = [&](int64_t begin, int64_t end, const Inputs& in) {
      for (int64_t i = begin; i < end; ++i) run_task(i, in);
    };
    const auto outputs = [&](int64_t begin, int64_t end, const Inputs& in) {
      run_outputs(begin * unit, std::min(end * unit, p_.n), in);
    };
    const Scratch h(floats(h_size_)), packed(packs() ? floats(rows_ * stride_) : 0);
    const Inputs shared = {reinterpret_cast<char*>(h.get()), packed.get()};
    if (work(p_.n) < kSmall) {
      inputs(0, task_count(), shared);
      outputs(0, tiles, shared);
    } else if (work(0) < kRepeated) {
      // To wait for the other threads' part of the inputs would take longer than to compute them once more.
      parallel_for(tiles, [&](int64_t begin, int64_t end) {
        const Scratch own_h(floats(h_size_)), own_packed(packs() ? floats(rows_ * stride_) : 0);
        const Inputs own = {reinterpret_cast<char*>(own_h.get()), own_packed.get()};
        inputs(0, task_count(), own);
        outputs(begin, end, own);
      });
    } else {
      parallel_for(task_count(), [&](int64_t begin, int64_t end) { inputs(begin, end, shared); });
      parallel_for(tiles, [&](int64_t begin, int64_t end) { outputs(begin, end, shared); });
    }
  }

 private:
  // Multiplications below which one thread does all: it is done before others would have woken up.
  static constexpr int64_t kSmall = 1 << 17;
  // Multiplications (and elements to pack) of the inputs below which every thread does all of them.
  static constexpr int64_t kRepeated = 1 << 17;

  // What both products read: h of all groups, and x as the dense kernels want it.
  struct Inputs {
    char* h;
    void* packed;
  };

  // Floats of memory for `count` elements as they are multiplied.
  int64_t floats(int64_t count) const { return (count * row_size_ + 3) / 4; }

  static int64_t stride_of(const Problem& p, const Kernels& kernels, int64_t rows) {
    const int64_t size = kernels.row_size[p.dtype], stride = round_up(p.k, kPad);
    const bool side_by_side = rows > 1 && (p.panels || size == 2);
    return side_by_side && stride * size % kAlike == 0 ? stride + kApart / size : stride;
  }

  // Whether x is packed for the base; panels are multiplied with rows as they were read.
  bool packs() const { return p_.weight && !p_.panels; }

  // Of the shrinks, and of what has `outputs` results a row.
  int64_t work(int64_t outputs) const {
    int64_t total = p_.weight ? rows_ * (outputs + packs()) * p_.k : 0;
    const int64_t sums = p_.ids ? 1 : p_.k;
    for (const Group& group : groups_) total += group.rows * group.pages * kTile * (outputs + sums);
    return total;
  }

  // Whether the sorted rows lie in memory one right after another; they may then be used where they are.
  bool contiguous() const {
    for (int64_t m = 1; m < rows_; ++m) {
      if (static_cast<const char*>(x_[m]) - static_cast<const char*>(x_[m - 1]) != p_.k * row_size_) return false;
    }
    return true;
  }

  void read_rows(int64_t begin, int64_t end, char* out) const {
    for (int64_t m = begin; m < end; ++m) {
      char* const row = out + m * stride_ * row_size_;
      kernels_.read_row[p_.dtype](x_[m], row, p_.k);
      std::memset(row + p_.k * row_size_, 0, (stride_ - p_.k) * row_size_);
    }
  }

  void make_tasks(int threads) {
    packs_ = packs() ? (rows_ + kTaskRows - 1) / kTaskRows : 0;
    for (int64_t g = 0; g < static_cast<int64_t>(groups_.size()); ++g) {
      const Group& group = groups_[g];
      // Few adapters are divided so that every thread has a part.
      const int64_t parts = std::max<int64_t>((group.pages + kTaskPages - 1) / kTaskPages,
                                              std::min<int64_t>(group.pages, threads / groups_.size()));
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t page = group.pages * part / parts, end = group.pages * (part + 1) / parts;
        for (int64_t row = 0; row < group.rows; row += kTaskRows) {
          tasks_.push_back({g, row, std::min(kTaskRows, group.rows - row), page, end - page});
        }
      }
    }
  }

  int64_t task_count() const { return packs_ + tasks_.size(); }

  bool one() const { return p_.m == 1 && !p_.transpose && kernels_.shrink_one[p_.dtype]; }

  void run_task(int64_t index, const Inputs& in) const {
    // Packs are quick, and spread among the shrinks, so that threads get as many.
    const int64_t packed = index * packs_ / task_count();
    if ((index + 1) * packs_ / task_count() > packed) {
      const int64_t row = packed * kTaskRows;
      kernels_.pack[p_.dtype](read_, stride_, rows_, row, row + kTaskRows, in.packed);
      return;
    }
    const Task& task = tasks_[index - packed];
    const Group& group = groups_[task.group];
    const Page* const pages = pages_.data() + group.page + task.page;
    const int64_t h_stride = group.pages * kTile;
    char* const out = in.h + (group.h + task.row * h_stride + task.page * kTile) * row_size_;
    if (p_.ids) {
      look_up(ids_.data() + group.first + task.row, task, pages, reinterpret_cast<float*>(out), h_stride);
      return;
    }
    const char* const x = read_ + (group.first + task.row) * stride_ * row_size_;
    if (one()) {
      kernels_.shrink_one[p_.dtype](shrink_, x, p_.k, pages, task.pages, out);
    } else {
      kernels_.shrink[p_.dtype](shrink_, x, stride_, task.rows, p_.k, pages, task.pages, out, h_stride);
    }
  }

  // The shrink of rows with a single one in them: a word of each page, whose 16 codes are the ranks of one output.
  void look_up(const int64_t* ids, const Task& task, const Page* pages, float* h, int64_t h_stride) const {
    constexpr int64_t kWord = 4;
    for (int64_t m = 0; m < task.rows; ++m) {
      for (int64_t p = 0; p < task.pages; ++p) {
        const uint8_t* const data = pages[p].data;
        uint32_t word;
        std::memcpy(&word, data + shrink_.tiles + ids[m] * kWord, kWord);
        float levels[4], scales[kTile];
        std::memcpy(levels, data + shrink_.levels, sizeof levels);
        std::memcpy(scales, data + kScalesOffset, sizeof scales);
        for (int64_t r = 0; r < kTile; ++r) {
          h[m * h_stride + p * kTile + r] = levels[word >> 2 * r & 3] * (scales[r] * pages[p].weight);
        }
      }
    }
  }

  void run_outputs(int64_t first, int64_t last, const Inputs& in) const {
    const int64_t block = rows_ == 1 ? kBlockOfOne : p_.panels && rows_ >= kRowsOfPanels ? kBlockOfPanels : kBlock;
    const Scratch tile(rows_ * block);
    for (int64_t n = first; n < last; n += block) {
      const int64_t end = std::min(n + block, last);
      if (p_.panels) {
        kernels_.dense_panels[p_.dtype](read_, stride_, rows_, p_.weight, p_.k, n, end, tile.get(), block);
      } else if (p_.weight) {
        kernels_.dense[p_.dtype](in.packed, stride_, rows_, p_.weight, p_.weight_stride, p_.k, n, end, tile.get(),
                                 block);
      } else {
        std::fill_n(tile.get(), rows_ * block, 0.0f);
      }
      for (const Group& group : groups_) {
        const Page* const pages = pages_.data() + group.page;
        float* const out = tile.get() + group.first * block;
        const char* const h = in.h + group.h * row_size_;
        if (one()) {
          kernels_.expand_one[p_.dtype](expand_, h, pages, group.pages, n, end, out);
        } else {
          kernels_.expand[p_.dtype](expand_, h, group.pages * kTile, group.rows, pages, group.pages, n, end, out,
                                    block);
        }
      }
      if (p_.weight) {
        kernels_.store[p_.dtype](tile.get(), block, rows_, p_.bias, y_.data(), n, end);
      } else {
        for (const Group& group : groups_) {
          kernels_.add[p_.dtype](tile.get() + group.first * block, block, group.rows, y_.data() + group.first, n, end);
        }
      }
    }
  }

  const Problem& p_;
  const Kernels& kernels_;
  const int64_t rows_;
  const int64_t row_size_, stride_;  // of the rows as they are multiplied: bytes of an element, elements between rows
  const char* read_ = nullptr;       // [rows, stride]
  std::vector<Task> tasks_;
  int64_t packs_ = 0;
  std::vector<const void*> x_;
  std::vector<int64_t> ids_;
  std::vector<void*> y_;
  std::vector<Page> pages_;
  std::vector<Group> groups_;
  int64_t h_size_ = 0;
  Factor shrink_, expand_;
};

}  // namespace

bool touches(const Problem& p) {
  if (!p.bank.list_length) return false;
  for (int64_t m = 0; m < p.m; ++m) {
    const int32_t slot = p.bank.slot_ids[m];
    if (slot >= 0 && p.bank.slot_pages[slot * p.bank.list_length] >= 0) return true;
  }
  return false;
}

void run(const Problem& p, const Kernels& kernels, int threads, const ParallelFor& parallel_for) {
  if (p.n == 0) return;
  const int64_t parts = (p.m + rows_in_flight(p, kernels) - 1) / rows_in_flight(p, kernels);
  const int64_t part = round_up((p.m + parts - 1) / std::max<int64_t>(parts, 1), 8);
  for (int64_t row = 0; row < p.m; row += part) {
    Batch(p, kernels, row, std::min(part, p.m - row)).run(threads, parallel_for);
  }
}

}  // namespace dts_fast::cpu
