// From the tensors of a checkpoint to the layout of layout.h, and back to floats.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "blob.h"
#include "kernels.h"
#include "layout.h"

namespace slimlm {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t packed_row_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

int size_of(int type) { return type == SLIMLM_F32 ? 4 : 2; }

float value_of(const void* values, int type, int64_t i) {
    if (type == SLIMLM_F32) return static_cast<const float*>(values)[i];
    const uint16_t h = static_cast<const uint16_t*>(values)[i];
    return type == SLIMLM_F16 ? half_to_float(h) : bfloat_to_float(h);
}

// Row `row` of a stored matrix: codes [columns] and which of them stay. False where the sizes do not fit.
bool read_row(const SlimlmMatrix& m, int64_t row, uint8_t* code, uint8_t* keep) {
    const int64_t columns = m.columns;
    int64_t kept = columns;
    if (m.keep) {
        const uint8_t* bits = m.keep + row * packed_row_bytes(columns, 1);
        kept = 0;
        for (int64_t c = 0; c < columns; ++c) kept += keep[c] = bits[c >> 3] >> (c & 7) & 1;
    } else {
        std::memset(keep, 1, size_t(columns));
    }
    const int64_t bytes = packed_row_bytes(kept, m.bits);
    if (bytes * m.rows != m.values_bytes) return false;
    const uint8_t* stream = static_cast<const uint8_t*>(m.values) + row * bytes;
    const unsigned mask = (1u << m.bits) - 1;
    int64_t bit = 0;
    for (int64_t c = 0; c < columns; ++c) {
        if (!keep[c]) continue;
        const int64_t byte = bit >> 3;
        unsigned word = stream[byte];
        if (byte + 1 < bytes) word |= unsigned(stream[byte + 1]) << 8;
        code[c] = uint8_t(word >> (bit & 7) & mask);
        bit += m.bits;
    }
    return true;
}

// What multiplies an activation, row by row as the products see it: [out, in] of a base or right factor, [out, rank] of a left one.
struct Source {
    const SlimlmMatrix& m;
    int64_t rows, columns;
    int zero;  // the code that stands for zero, or -1
    std::vector<uint8_t> all_codes, all_keep;  // of a transposed matrix

    explicit Source(const SlimlmMatrix& stored)
        : m(stored), rows(m.transposed ? m.columns : m.rows), columns(m.transposed ? m.rows : m.columns), zero(zero_code(m)) {}

    static int zero_code(const SlimlmMatrix& m) {
        if (!m.levels) return 1 << (m.bits - 1);
        for (int i = 0; i < 1 << m.bits; ++i)
            if ((m.levels[i] & 0x7fff) == 0) return i;
        return -1;
    }

    bool prepare() {
        if (!m.transposed) return true;
        std::vector<uint8_t> code(size_t(m.columns)), keep(size_t(m.columns));
        all_codes.resize(size_t(rows * columns));
        all_keep.resize(size_t(rows * columns));
        for (int64_t r = 0; r < m.rows; ++r) {
            if (!read_row(m, r, code.data(), keep.data())) return false;
            for (int64_t c = 0; c < m.columns; ++c) {
                all_codes[size_t(c * columns + r)] = code[size_t(c)];
                all_keep[size_t(c * columns + r)] = keep[size_t(c)];
            }
        }
        return true;
    }

    bool row(int64_t r, uint8_t* code, uint8_t* keep) const {
        if (!m.transposed) return read_row(m, r, code, keep);
        std::memcpy(code, &all_codes[size_t(r * columns)], size_t(columns));
        std::memcpy(keep, &all_keep[size_t(r * columns)], size_t(columns));
        return true;
    }
};

// The numbers that the layout of one matrix follows from.
struct Plan {
    MatrixHeader head{};
    std::vector<int32_t> map;  // empty: input i is at place i
    std::vector<int32_t> first_piece, tile_of_row;
    std::vector<Piece> pieces;
    std::vector<Tile> tiles;
};

bool tables_of(const SlimlmMatrix& m, const std::vector<int64_t>& counts, MatrixHeader& head) {
    head.unit_fast = head.unit_precise = 1;
    if (!m.levels) {
        const int low = m.bits <= 4 ? m.bits : m.bits - 4;
        for (int i = 0; i < 16; ++i) {
            head.fast[i] = head.upper[i] = int8_t(i < 1 << low ? i - (1 << (low - 1)) : 0);
            head.lower[i] = int8_t(i);
        }
        return true;
    }
    float level[16] = {}, largest = 0;
    const int count = 1 << m.bits;
    for (int i = 0; i < count; ++i) {
        level[i] = half_to_float(m.levels[i]);
        if (!std::isfinite(level[i])) return false;
        largest = std::max(largest, std::fabs(level[i]));
    }
    if (largest == 0) return true;
    // 12 bits: the largest level becomes 63 x 64 + 31.
    head.unit_precise = largest / 4063;
    for (int i = 0; i < count; ++i) {
        const int fine = int(std::lround(level[i] / head.unit_precise));
        head.upper[i] = int8_t((fine + 32 + 64 * 64) / 64 - 64);
        head.lower[i] = int8_t(fine - 64 * head.upper[i]);
    }
    // 7 bits: of the units that make the largest level 32 to 63, the one that errs least over the codes in use.
    double least = INFINITY;
    for (int step = 0; step <= 310; ++step) {
        const float unit = largest / (32 + 0.1f * float(step));
        double error = 0;
        for (int i = 0; i < count; ++i) {
            const double off = level[i] - unit * std::nearbyint(level[i] / unit);
            error += double(counts[size_t(i)]) * off * off;
        }
        if (error < least) {
            least = error;
            head.unit_fast = unit;
        }
    }
    for (int i = 0; i < count; ++i) head.fast[i] = int8_t(std::lround(level[i] / head.unit_fast));
    return true;
}

int check(const SlimlmMatrix& m) {
    const bool plain = m.bits == 0;
    if (m.rows < 0 || m.columns < 0 || (!plain && (m.bits < (m.levels ? 1 : 2) || m.bits > 8))) return SLIMLM_BAD_ARGUMENT;
    if (m.rows > INT32_MAX / 2 || m.columns > INT32_MAX / 2) return SLIMLM_BAD_ARGUMENT;
    if (plain) {
        if (m.keep || m.two_of_four || m.type < 0 || m.type > SLIMLM_BF16) return SLIMLM_BAD_ARGUMENT;
        return m.values_bytes == m.rows * m.columns * size_of(m.type) ? SLIMLM_OK : SLIMLM_WRONG_SIZE;
    }
    if (m.levels && m.bits > 4) return SLIMLM_BAD_ARGUMENT;
    if (m.zero && (m.levels || m.transposed || m.two_of_four)) return SLIMLM_BAD_ARGUMENT;
    if (m.scale_type != SLIMLM_F32 && m.scale_type != SLIMLM_F16) return SLIMLM_BAD_ARGUMENT;
    if (m.group < 0 || (m.transposed && (m.keep || m.two_of_four || m.input_scale))) return SLIMLM_BAD_ARGUMENT;
    if (m.two_of_four && (m.columns % 4 || (m.scale_columns > 1 && m.group % 4))) return SLIMLM_BAD_ARGUMENT;
    const int64_t groups = m.group == 0 || m.columns == 0 ? 1 : (m.columns + m.group - 1) / m.group;
    if ((m.scale_rows != 1 && m.scale_rows != m.rows) || (m.scale_columns != groups)) return SLIMLM_WRONG_SIZE;
    if (m.scale_rows == 1 && m.rows != 1 && m.scale_columns != 1) return SLIMLM_WRONG_SIZE;
    // Places of inputs are 32-bit numbers, and groups are filled up to whole blocks of them.
    const int64_t filled = std::min(m.columns, m.group ? m.group : m.columns) + kBlock - 1;
    if (groups * (filled / kBlock * kBlock) > INT32_MAX) return SLIMLM_BAD_ARGUMENT;
    return SLIMLM_OK;
}

float scale_at(const SlimlmMatrix& m, int64_t row, int64_t group) {
    return value_of(m.scale, m.scale_type, (m.scale_rows == 1 ? 0 : row) * m.scale_columns + group);
}

int zero_at(const SlimlmMatrix& m, int64_t row, int64_t group) {
    const int64_t bit = ((m.scale_rows == 1 ? 0 : row) * m.scale_columns + group) * m.bits;
    unsigned word = m.zero[bit >> 3];
    if ((bit & 7) + m.bits > 8) word |= unsigned(m.zero[(bit >> 3) + 1]) << 8;
    return int(word >> (bit & 7) & ((1u << m.bits) - 1));
}

void plan_columns(const SlimlmMatrix& m, int64_t columns, Plan& plan) {
    MatrixHeader& head = plan.head;
    const bool grouped = !m.transposed && m.scale_columns > 1;
    const int64_t group = grouped ? m.group : columns;
    const bool filled = grouped && group % kBlock;
    int64_t place = 0;  // of the next input
    plan.first_piece.push_back(0);
    int in_activation_group = 0;
    for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
        const int64_t size = std::min(group, columns - begin);
        int64_t blocks = (size + kBlock - 1) / kBlock;
        if (filled)
            for (int64_t i = 0; i < blocks * kBlock; ++i) plan.map.push_back(i < size ? int32_t(begin + i) : -1);
        place += blocks * kBlock;
        while (blocks) {
            const int room = kActivationGroup / kBlock - in_activation_group;
            const int now = int(std::min<int64_t>(room, blocks));
            plan.pieces.push_back({now, int32_t(g)});
            blocks -= now;
            in_activation_group += now;
            if (in_activation_group == kActivationGroup / kBlock) {
                plan.first_piece.push_back(int32_t(plan.pieces.size()));
                in_activation_group = 0;
            }
        }
    }
    if (in_activation_group) plan.first_piece.push_back(int32_t(plan.pieces.size()));
    head.padded = int32_t(place);
    head.pieces = int32_t(plan.pieces.size());
    head.groups = int32_t(plan.first_piece.size()) - 1;
    head.scale_kind = !grouped ? kRowScale : m.scale_type == SLIMLM_F16 ? kHalfPerPiece : kFloatPerPiece;
    const CodeFormat format = format_of(m.bits);
    head.tile_bytes = 4 * kRows;
    for (const Piece& piece : plan.pieces)
        head.tile_bytes += scale_bytes(head.scale_kind) + zero_bytes(head) + quads_of(piece.blocks, head.sparse) * format.quad_bytes(head.sparse);
    head.tile_bytes = aligned(head.tile_bytes);
}

void plan_rows(const SlimlmMatrix& m, int64_t rows, Plan& plan) {
    MatrixHeader& head = plan.head;
    const bool folded = m.transposed && m.scale_rows == m.rows && !(m.scale_rows == 1 && m.scale_columns == 1);
    head.folds = folded ? int32_t(m.scale_columns) : 0;
    head.fold_type = m.scale_type;
    const int64_t group = folded && m.group ? m.group : std::max<int64_t>(rows, 1);
    plan.tile_of_row.push_back(0);
    for (int64_t row = 0; row < rows;) {
        const int64_t end = std::min({rows, (row / group + 1) * group, (row / kRows + 1) * kRows});
        plan.tiles.push_back({int32_t(row), int32_t(end - row), int32_t(row / group)});
        row = end;
        if (row % kRows == 0 || row == rows) plan.tile_of_row.push_back(int32_t(plan.tiles.size()));
    }
    head.tiles = int32_t(plan.tiles.size());
}

int64_t place_tables(const SlimlmMatrix& m, Plan& plan) {
    MatrixHeader& head = plan.head;
    int64_t end = aligned(sizeof(MatrixHeader));
    auto take = [&end](int64_t bytes) {
        const int64_t start = end;
        end = aligned(end + bytes);
        return bytes ? start : 0;
    };
    if (head.kind == kPlain) {
        head.data = take(std::max<int64_t>(1, int64_t(head.rows) * head.columns * size_of(head.type)));
        return head.bytes = end;
    }
    head.map = take(int64_t(plan.map.size()) * 4);
    head.input_scale = take(m.input_scale ? m.columns * 4 : 0);
    head.first_piece = take(int64_t(plan.first_piece.size()) * 4);
    head.piece_list = take(int64_t(plan.pieces.size()) * int64_t(sizeof(Piece)));
    head.tile_list = take(int64_t(plan.tiles.size()) * int64_t(sizeof(Tile)));
    head.tile_of_row = take(int64_t(plan.tile_of_row.size()) * 4);
    head.fold = take(int64_t(head.folds) * head.columns * size_of(head.fold_type));
    head.data = take(std::max<int64_t>(1, head.tiles * head.tile_bytes));
    // Prefetching and whole-vector loads may look past the last tile.
    return head.bytes = end + 64;
}

Plan plan_of(const SlimlmMatrix& m) {
    Plan plan;
    MatrixHeader& head = plan.head;
    head.rows = int32_t(m.transposed ? m.columns : m.rows);
    head.columns = int32_t(m.transposed ? m.rows : m.columns);
    head.type = m.type;
    head.bits = m.bits;
    if (m.bits == 0) {
        head.kind = kPlain;
    } else {
        head.kind = kCoded;
        head.sparse = m.two_of_four;
        head.codebook = m.levels != nullptr;
        head.zeros = m.zero != nullptr;
        plan_columns(m, head.columns, plan);
        plan_rows(m, head.rows, plan);
    }
    place_tables(m, plan);
    return plan;
}

void put(uint8_t* plane, int bits, int step, int byte, int value) {
    if (bits == 4) {
        plane[step / 2 * 64 + byte] |= uint8_t(value << 4 * (step & 1));
        return;
    }
    plane[byte] |= uint8_t((value & 3) << 2 * step);
    if (bits == 3) plane[64 + (byte & 31)] |= uint8_t((value >> 2) << (byte < 32 ? step : 4 + step));
}

// One quad of one row: its codes (-1: none) at `code` [16 or 32 places].
int put_quad(uint8_t* quad, const MatrixHeader& head, const CodeFormat& format, int zero, int lane, const int16_t* code) {
    uint8_t* first = quad + (head.sparse ? 64 : 0);
    uint8_t* second = first + format.plane_bytes(0);
    auto put_code = [&](int step, int byte, int value) {
        if (format.planes == 2) put(second, 4, step, byte, value & 15);
        put(first, format.first, step, byte, format.planes == 2 ? value >> 4 : value);
    };
    for (int step = 0; step < 4; ++step) {
        if (!head.sparse) {
            for (int i = 0; i < 4; ++i) {
                const int value = code[4 * step + i];
                if (value < 0 && zero < 0) return SLIMLM_NO_ZERO_LEVEL;
                put_code(step, 4 * lane + i, value < 0 ? zero : value);
            }
            continue;
        }
        for (int half = 0; half < 2; ++half) {
            const int16_t* four = code + 8 * step + 4 * half;
            int position[2] = {0, 1}, kept = 0;
            for (int i = 0; i < 4; ++i) {
                if (four[i] < 0) continue;
                if (kept == 2) return SLIMLM_NOT_TWO_OF_FOUR;
                position[kept++] = i;
            }
            for (int i = kept; i < 2; ++i) {
                if (zero < 0) return SLIMLM_NO_ZERO_LEVEL;
                position[i] = 3;
                if (kept == 1 && position[0] == 3) position[i] = 2;
            }
            for (int i = 0; i < 2; ++i) {
                const int byte = 4 * lane + 2 * half + i;
                quad[byte] |= uint8_t(position[i] << 2 * step);
                const int value = i < kept ? four[position[i]] : zero;
                put_code(step, byte, value);
            }
        }
    }
    return SLIMLM_OK;
}

void fill_tables(const SlimlmMatrix& m, const Plan& plan, uint8_t* to) {
    const MatrixHeader& head = plan.head;
    auto copy = [to](int64_t offset, const void* from, size_t bytes) {
        if (bytes) std::memcpy(to + offset, from, bytes);
    };
    copy(head.map, plan.map.data(), plan.map.size() * 4);
    copy(head.first_piece, plan.first_piece.data(), plan.first_piece.size() * 4);
    copy(head.piece_list, plan.pieces.data(), plan.pieces.size() * sizeof(Piece));
    copy(head.tile_list, plan.tiles.data(), plan.tiles.size() * sizeof(Tile));
    copy(head.tile_of_row, plan.tile_of_row.data(), plan.tile_of_row.size() * 4);
    if (m.input_scale)
        for (int64_t i = 0; i < m.columns; ++i)
            reinterpret_cast<float*>(to + head.input_scale)[i] = half_to_float(m.input_scale[i]);
    for (int64_t g = 0; g < head.folds; ++g)
        for (int64_t c = 0; c < head.columns; ++c) {
            const int64_t from = c * m.scale_columns + g, place = g * head.columns + c;
            if (head.fold_type == SLIMLM_F32)
                reinterpret_cast<float*>(to + head.fold)[place] = static_cast<const float*>(m.scale)[from];
            else
                reinterpret_cast<uint16_t*>(to + head.fold)[place] = static_cast<const uint16_t*>(m.scale)[from];
        }
}

int pack_plain(const SlimlmMatrix& m, const Plan& plan, uint8_t* to) {
    const MatrixHeader& head = plan.head;
    const size_t size = size_t(size_of(head.type));
    if (!m.transposed) {
        if (m.values_bytes) std::memcpy(to + head.data, m.values, size_t(m.values_bytes));
        return SLIMLM_OK;
    }
    const auto* from = static_cast<const uint8_t*>(m.values);
    for (int64_t r = 0; r < m.rows; ++r)
        for (int64_t c = 0; c < m.columns; ++c)
            std::memcpy(to + head.data + size_t(c * m.rows + r) * size, from + size_t(r * m.columns + c) * size, size);
    return SLIMLM_OK;
}

int pack_coded(const SlimlmMatrix& m, Plan& plan, uint8_t* to) {
    MatrixHeader& head = plan.head;
    fill_tables(m, plan, to);
    Source source(m);
    if (!source.prepare()) return SLIMLM_WRONG_SIZE;
    const CodeFormat format = format_of(m.bits);
    const int per_quad = head.sparse ? 32 : 16;
    const size_t width = size_t(head.columns), padded = size_t(head.padded);
    std::vector<uint8_t> code(width), keep(width);
    std::vector<int16_t> placed(padded);
    std::vector<int64_t> counts(256);
    const int64_t group = m.scale_columns > 1 ? m.group : std::max<int64_t>(1, head.columns);
    // Filling meets activations of zero, so any code serves there.
    const int zero = source.zero, filling = std::max(zero, 0);
    for (int t = 0; t < head.tiles; ++t) {
        uint8_t* tile = to + head.data + t * head.tile_bytes;
        auto* row_scale = reinterpret_cast<float*>(tile);
        const Tile& own = plan.tiles[size_t(t)];
        for (int lane = 0; lane < kRows; ++lane) {
            const int64_t row = own.row + lane;
            const bool real = lane < own.count;
            if (real) {
                if (!source.row(row, code.data(), keep.data())) return SLIMLM_WRONG_SIZE;
                for (size_t c = 0; c < width; ++c)
                    if (keep[c]) ++counts[code[c]];
            }
            int kept_in_four = 0;
            for (size_t p = 0; p < padded; ++p) {
                const int64_t c = plan.map.empty() ? (p < width ? int64_t(p) : -1) : plan.map[p];
                const bool outside = !real || c < 0;
                if (p % 4 == 0) kept_in_four = 0;
                if (outside)
                    placed[p] = int16_t(head.sparse && kept_in_four >= 2 ? -1 : filling);
                else if (keep[size_t(c)])
                    placed[p] = int16_t(code[size_t(c)]);
                else
                    placed[p] = int16_t(m.zero ? zero_at(m, row, c / group) : -1);
                kept_in_four += placed[p] >= 0;
            }
            row_scale[lane] = !real ? 0 : head.folds || head.scale_kind != kRowScale ? 1 : scale_at(m, row, 0);
            uint8_t* at = tile + 4 * kRows;
            const int16_t* next = placed.data();
            for (const Piece& piece : plan.pieces) {
                if (head.scale_kind == kHalfPerPiece)
                    reinterpret_cast<uint16_t*>(at)[lane] =
                        real ? static_cast<const uint16_t*>(m.scale)[row * m.scale_columns + piece.group] : uint16_t(0);
                if (head.scale_kind == kFloatPerPiece)
                    reinterpret_cast<float*>(at)[lane] = real ? scale_at(m, row, piece.group) : 0;
                at += scale_bytes(head.scale_kind);
                if (head.zeros) {
                    const int shift = real ? zero_at(m, row, piece.group) - (1 << (m.bits - 1)) : 0;
                    reinterpret_cast<uint16_t*>(at)[lane] = float_to_half(float(shift));
                }
                at += zero_bytes(head);
                for (int q = 0; q < quads_of(piece.blocks, head.sparse); ++q) {
                    const int error = put_quad(at, head, format, zero, lane, next);
                    if (error) return error;
                    at += format.quad_bytes(head.sparse);
                    next += per_quad;
                }
            }
        }
    }
    return tables_of(m, counts, head) ? SLIMLM_OK : SLIMLM_BAD_ARGUMENT;
}

int check_layer(const SlimlmMatrix* matrices, int32_t count) {
    if (!matrices || count < 1 || count % 2 == 0 || count > kMatrices) return SLIMLM_BAD_ARGUMENT;
    for (int i = 0; i < count; ++i) {
        const int error = check(matrices[i]);
        if (error) return error;
        const bool left = i > 0 && i % 2 == 0;
        if (left != bool(matrices[i].transposed)) return SLIMLM_BAD_ARGUMENT;
        if (i % 2 == 1 && matrices[i].columns != matrices[0].columns) return SLIMLM_BAD_ARGUMENT;
        if (left && (matrices[i].columns != matrices[0].rows || matrices[i].rows != matrices[i - 1].rows))
            return SLIMLM_BAD_ARGUMENT;
    }
    return SLIMLM_OK;
}

int64_t head_bytes(int32_t count) { return aligned(int64_t(sizeof(BlobHeader)) + 8 * count); }

int pack_layer(const SlimlmMatrix* matrices, int32_t count, uint8_t* blob, int64_t bytes) {
    std::memset(blob, 0, size_t(bytes));
    auto* head = reinterpret_cast<BlobHeader*>(blob);
    auto* offsets = reinterpret_cast<int64_t*>(blob + sizeof(BlobHeader));
    int64_t end = head_bytes(count);
    for (int i = 0; i < count; ++i) {
        Plan plan = plan_of(matrices[i]);
        offsets[i] = end;
        if (end + plan.head.bytes > bytes) return SLIMLM_WRONG_SIZE;
        const int error = matrices[i].bits ? pack_coded(matrices[i], plan, blob + end) : pack_plain(matrices[i], plan, blob + end);
        if (error) return error;
        std::memcpy(blob + end, &plan.head, sizeof(MatrixHeader));
        end = aligned(end + plan.head.bytes);
    }
    if (end != bytes) return SLIMLM_WRONG_SIZE;
    *head = {kMagic, SLIMLM_LAYOUT, bytes, matrices[0].rows, matrices[0].columns, count, 0, 0};
    head->checksum = checksum(*head, blob);
    return SLIMLM_OK;
}

// Adds to dense the matrix that the codes at `quad` stand for, times `unit` and the scales of its 16 rows.
void unpack_quad(const uint8_t* quad, const MatrixHeader& head, const CodeFormat& format, const int* level_of, int lane, int* row) {
    const uint8_t* first = quad + (head.sparse ? 64 : 0);
    const uint8_t* second = first + format.plane_bytes(0);
    auto get = [](const uint8_t* plane, int bits, int step, int byte) {
        if (bits == 4) return plane[step / 2 * 64 + byte] >> 4 * (step & 1) & 15;
        int value = plane[byte] >> 2 * step & 3;
        if (bits == 3) value |= (plane[64 + (byte & 31)] >> (byte < 32 ? step : 4 + step) & 1) << 2;
        return value;
    };
    for (int step = 0; step < 4; ++step)
        for (int i = 0; i < 4; ++i) {
            const int byte = 4 * lane + i;
            int code = get(first, format.first, step, byte);
            if (format.planes == 2) code = 16 * code + get(second, 4, step, byte);
            const int place = head.sparse ? 8 * step + 4 * (i / 2) + (quad[byte] >> 2 * step & 3) : 4 * step + i;
            row[place] += level_of[code];
        }
}

int unpack(const MatrixHeader* m, int precision, float* dense) {
    const MatrixHeader& head = *m;
    const int64_t width = head.columns;
    if (head.kind == kPlain) {
        for (int64_t i = 0; i < head.rows * width; ++i) dense[i] = value_of(at<uint8_t>(m, head.data), head.type, i);
        return SLIMLM_OK;
    }
    const CodeFormat format = format_of(head.bits);
    const float unit = precision == SLIMLM_PRECISE ? head.unit_precise : head.unit_fast;
    int level_of[256] = {};
    for (int code = 0; code < 256; ++code) {
        if (format.planes == 2)
            level_of[code] = 16 * head.fast[code >> 4] + head.lower[code & 15];
        else
            level_of[code] = !head.codebook || precision == SLIMLM_FAST ? head.fast[code & 15]
                                                                         : 64 * head.upper[code & 15] + head.lower[code & 15];
    }
    const auto* map = at<int32_t>(m, head.map);
    const auto* input_scale = at<float>(m, head.input_scale);
    const auto* pieces = at<Piece>(m, head.piece_list);
    const int per_quad = head.sparse ? 32 : 16;
    for (int t = 0; t < head.tiles; ++t) {
        const Tile& tile = at<Tile>(m, head.tile_list)[t];
        const auto* data = at<uint8_t>(m, head.data) + t * head.tile_bytes;
        for (int lane = 0; lane < tile.count; ++lane) {
            float* row = dense + (tile.row + lane) * width;
            const float row_scale = reinterpret_cast<const float*>(data)[lane];
            const uint8_t* next = data + 4 * kRows;
            int64_t place = 0;
            for (int p = 0; p < head.pieces; ++p) {
                float scale = row_scale * unit;
                if (head.scale_kind == kHalfPerPiece) scale *= half_to_float(reinterpret_cast<const uint16_t*>(next)[lane]);
                if (head.scale_kind == kFloatPerPiece) scale *= reinterpret_cast<const float*>(next)[lane];
                next += scale_bytes(head.scale_kind);
                const int zero = head.zeros ? int(half_to_float(reinterpret_cast<const uint16_t*>(next)[lane])) : 0;
                next += zero_bytes(head);
                for (int q = 0; q < quads_of(pieces[p].blocks, head.sparse); ++q) {
                    int level[32] = {};
                    unpack_quad(next, head, format, level_of, lane, level);
                    next += format.quad_bytes(head.sparse);
                    for (int i = 0; i < per_quad; ++i, ++place) {
                        const int64_t c = map ? map[place] : place;
                        if (c < 0 || c >= width) continue;
                        float value = float(level[i] - zero) * scale;
                        if (head.folds) value *= value_of(at<uint8_t>(m, head.fold), head.fold_type, tile.fold * width + c);
                        row[c] = input_scale ? value * input_scale[c] : value;
                    }
                }
            }
        }
    }
    return SLIMLM_OK;
}

}  // namespace
}  // namespace slimlm

using namespace slimlm;

extern "C" int64_t slimlm_packed_bytes(const SlimlmMatrix* matrices, int32_t count) try {
    const int error = check_layer(matrices, count);
    if (error) return -error;
    int64_t end = head_bytes(count);
    for (int i = 0; i < count; ++i) end = aligned(end + plan_of(matrices[i]).head.bytes);
    return end;
} catch (const std::bad_alloc&) {
    return -SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_pack(const SlimlmMatrix* matrices, int32_t count, uint8_t* blob, int64_t bytes) try {
    const int error = check_layer(matrices, count);
    if (error) return error;
    if (!blob || bytes < head_bytes(count) || reinterpret_cast<uintptr_t>(blob) % 64) return SLIMLM_BAD_ARGUMENT;
    return pack_layer(matrices, count, blob, bytes);
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_unpack(const uint8_t* blob, int64_t bytes, int32_t index, int32_t precision, float* dense) {
    Blob opened;
    const int error = open_blob(blob, bytes, opened);
    if (error) return error;
    if (index < 0 || index >= opened.count || !dense) return SLIMLM_BAD_ARGUMENT;
    return unpack(opened.matrix[index], precision, dense);
}

extern "C" int slimlm_verify(const uint8_t* blob, int64_t bytes) {
    Blob opened;
    const int error = open_blob(blob, bytes, opened);
    if (error) return error;
    const auto* head = reinterpret_cast<const BlobHeader*>(blob);
    return head->checksum == checksum(*head, blob) ? SLIMLM_OK : SLIMLM_BAD_BLOB;
}
