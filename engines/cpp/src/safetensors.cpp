#include "safetensors.hpp"

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "dtype.hpp"
#include "json_reader.hpp"
#include "printable.hpp"

namespace lorafuse {
namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the format's own limit
constexpr std::size_t kDimensions = 32;                // of a tensor, as Python's reader

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& reason) {
    throw Error(path.string() + ": not a whole safetensors file (" + reason + "); fetch or save it again");
}

struct Entry {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t start, end;
};

std::vector<std::int64_t> counts_of(const JsonReader& json) {
    std::vector<std::int64_t> counts;
    json.each([&](const JsonReader& count) { counts.push_back(count.number()); });
    if (std::any_of(counts.begin(), counts.end(), [](std::int64_t count) { return count < 0; }))
        throw JsonError("a size or an offset is negative");
    return counts;
}

Entry entry_of(const std::filesystem::path& path, const std::string& name, const JsonReader& described) {
    described.check_fields({"dtype", "shape", "data_offsets"});
    const std::string code = described.at("dtype").text();
    std::vector<std::int64_t> shape = counts_of(described.at("shape"));
    const std::vector<std::int64_t> offsets = counts_of(described.at("data_offsets"));
    if (shape.size() > kDimensions) throw JsonError("more than 32 dimensions of " + in_quotes(name));
    if (offsets.size() != 2) throw JsonError("expected 2 offsets of " + in_quotes(name));
    const std::optional<DType> dtype = dtype_in_safetensors(code);
    if (!dtype) {
        throw Error(path.string() + ": tensor '" + printable(name) + "' has dtype " + printable(code) +
                    "; expected one of F64, F32, F16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, BF16");
    }
    return {name, *dtype, std::move(shape), static_cast<std::uint64_t>(offsets[0]),
            static_cast<std::uint64_t>(offsets[1])};
}

// The header's text, and where the data starts.
std::string_view header_of(const std::filesystem::path& path, const MappedFile& file, std::uint64_t& data_start) {
    if (file.size() < 8) refuse(path, "it is shorter than a header");
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<std::uint64_t>(file.data()[i]);
    if (length > kLongestHeader) refuse(path, "its header is longer than 100 MB");
    if (length > file.size() - 8) refuse(path, "its header is cut short");
    data_start = 8 + length;
    return {reinterpret_cast<const char*>(file.data() + 8), static_cast<std::size_t>(length)};
}

// Every byte of data belongs to exactly one tensor: no gaps, no overlaps, nothing behind.
void check_coverage(const std::filesystem::path& path, std::vector<Entry>& entries, std::uint64_t size) {
    std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& two) {
        return std::tie(one.start, one.end) < std::tie(two.start, two.end);
    });
    std::uint64_t at = 0;
    for (const Entry& entry : entries) {
        const auto refuse_tensor = [&](const char* what) { refuse(path, "tensor " + in_quotes(entry.name) + what); };
        if (entry.start != at || entry.end < at) refuse_tensor(" does not begin where the one before ends");
        const auto bytes = bytes_of(entry.shape, entry.dtype);
        if (!bytes) refuse_tensor(" has a size that can't be counted");
        if (bytes != entry.end - entry.start) refuse_tensor(" has another size than its shape and dtype say");
        at = entry.end;
    }
    if (at != size) refuse(path, "its tensors don't cover it");
}

}  // namespace

TensorFile::TensorFile(std::filesystem::path path, std::shared_ptr<const MappedFile> file)
    : path_(std::move(path)), file_(std::move(file)) {
    try {
        read();
    } catch (const JsonError& error) {
        refuse(path_, "in its header: " + printable(error.what()));
    }
}

void TensorFile::read() {
    std::uint64_t data_start = 0;
    const JsonDocument header(header_of(path_, *file_, data_start));
    std::vector<Entry> entries;
    header.root().each([&](const std::string& name, const JsonReader& described) {
        if (name != "__metadata__") entries.push_back(entry_of(path_, name, described));
        else described.each([](const std::string&, const JsonReader& text) { text.text(); });
    });
    check_coverage(path_, entries, file_->size() - data_start);
    for (Entry& entry : entries) {
        const std::byte* data = file_->data() + data_start + entry.start;
        tensors_[entry.name] = {entry.dtype, std::move(entry.shape), data,
                                static_cast<std::size_t>(entry.end - entry.start)};
    }
}

}  // namespace lorafuse
