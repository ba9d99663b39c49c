// From the weights that a graph names to the tensors of the bundle's files: each claimed, described and in its place.
//
// A graph says by itself where a weight lies, the weight map says what it is called, and a weights file what it holds.
// Whatever one of the three says, the other two must say as well: else a task's answer would depend on who reads it, or
// on the task that was loaded before. See exporter/bundle/linked.py. Each throws Error naming what does not fit.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "graph_file.hpp"
#include "manifest.hpp"
#include "safetensors.hpp"

namespace lorafuse {

using Tensors = std::map<std::string, TensorView>;
using TensorFiles = std::vector<std::shared_ptr<const TensorFile>>;
using WeightMap = std::map<std::string, WeightRecord>;

// The last of the files that holds the weight in its shape and dtype; none where no file does.
const TensorFile* home_of(const std::string& name, const WeightRecord& weight, const TensorFiles& files);

// The map's tensors in the files, by parameter. One of another shape or dtype belongs to another graph (a head of
// another size) and is left out.
Tensors weights_in(const TensorFiles& files, const WeightMap& weights);

// Every tensor of a task's file is claimed by the weight map, in its shape and dtype: one that it misses would stay the
// base's, or be another task's.
void check_claimed(const TensorFile& file, const WeightMap& weights);

// The weight map's entries are the initializers whose values lie in files.
void check_mapped(const std::filesystem::path& path, const GraphFile& graph, const WeightMap& weights);

// Each weight lies in its home among `files`: a task's own before the base's. A graph that leaves out a tensor of the
// task's would answer as the base where it runs by itself, and as the task where the weight map is followed.
void check_homes(const std::filesystem::path& path, const GraphFile& graph, const WeightMap& weights,
                 const TensorFiles& files);

// The tensor of each initializer whose values lie in files. Its location must be one of `files`, beside `path`, and its
// range exactly that of the weight's tensor.
Tensors linked(const std::filesystem::path& path, const GraphFile& graph, const WeightMap& weights,
               const TensorFiles& files);

}  // namespace lorafuse
