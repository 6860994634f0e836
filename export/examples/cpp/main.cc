// Separates a WAV file with a bundle of `avsep export`, with ONNX Runtime and nothing else:
//
//   separate BUNDLE recording.wav flute,piano OUT
//
// writes OUT/recording_flute.wav, OUT/recording_piano.wav and OUT/recording_residual.wav: the samples that
// `avsep-runtime BUNDLE recording.wav --classes flute,piano --format FLOAT --out OUT` gives, to 1e-5.
//
// For separators that go by the name alone: those that look at nothing, and those that can go unseen (`seen` among the
// graph's inputs). It trusts the bundle: `avsep export verify BUNDLE` checks its hashes.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "json.h"
#include "wav.h"

namespace {

constexpr long long kNone = -1;

// The network reads [start, start + clip); left and right are the centres of the seams with the neighbours.
struct Chunk {
  long long start, left, right;
};

struct Chunking {
  long long clip, context, crossfade, align;
};

// Neighbouring chunks overlap by two contexts. Each starts at a multiple of `align`; the last ends with the recording,
// or less than `align` after it.
std::vector<Chunk> PlanChunks(long long total, const Chunking& c) {
  if (total <= c.clip) return {{0, kNone, kNone}};
  const long long room = c.clip - 2 * c.context, hop = room - room % c.align;
  const long long last = (total - c.clip + c.align - 1) / c.align * c.align;
  std::vector<Chunk> chunks;
  for (long long start = 0; start < last; start += hop) chunks.push_back({start, kNone, kNone});
  chunks.push_back({last, kNone, kNone});
  for (size_t i = 0; i + 1 < chunks.size(); ++i)
    chunks[i].right = chunks[i + 1].left = (chunks[i].start + c.clip + chunks[i + 1].start) / 2;
  return chunks;
}

// Adds a chunk's estimate to the result: whole between its cross-fades, faded within them.
void Add(std::vector<float>& result, const float* estimate, const Chunk& chunk, const Chunking& c) {
  const long long fade = c.crossfade, total = static_cast<long long>(result.size());
  const auto rising = [fade](long long i) {
    return static_cast<float>(0.5 - 0.5 * std::cos(std::acos(-1.0) * (static_cast<double>(i) + 0.5) / fade));
  };
  long long begin = 0, end = total;
  if (chunk.left != kNone) {
    const long long first = chunk.left - fade / 2;
    for (long long i = 0; i < fade; ++i) result[first + i] += rising(i) * estimate[first + i - chunk.start];
    begin = first + fade;
  }
  if (chunk.right != kNone) {
    const long long first = chunk.right - fade / 2;
    for (long long i = 0; i < fade; ++i) result[first + i] += rising(fade - 1 - i) * estimate[first + i - chunk.start];
    end = first;
  }
  end = std::min(end, chunk.start + c.clip);
  std::copy(estimate + (begin - chunk.start), estimate + (end - chunk.start), result.begin() + begin);
}

// An input of the graph: its declared shape, where "batch" and "sources" may be open, and its bytes.
struct Input {
  std::string name, type;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

template <typename T>
void Fill(Input& input, T value) {
  T* place = reinterpret_cast<T*>(input.bytes.data());
  std::fill(place, place + input.bytes.size() / sizeof(T), value);
}

ONNXTensorElementDataType TypeOf(const std::string& name) {
  if (name == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (name == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  if (name == "bool") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  throw std::runtime_error("the graph takes " + name + ", which this example does not know");
}

size_t SizeOf(const std::string& type) { return type == "float32" ? 4 : type == "int64" ? 8 : 1; }

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts{""};
  for (char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string Joined(const std::vector<Json>& names) {
  std::string text;
  for (const Json& name : names) text += (text.empty() ? "" : ", ") + name.Text();
  return text;
}

std::string FileName(std::string name) {
  for (char& c : name)
    if (std::string("<>:\"/\\|?* ").find(c) != std::string::npos) c = '-';
  return name;
}

void Separate(const std::filesystem::path& folder, const std::string& audio, const std::string& asked,
              const std::filesystem::path& out) {
  std::ifstream file(folder / "manifest.json", std::ios::binary);
  if (!file) throw std::runtime_error(folder.string() + " is no bundle in a folder: it has no manifest.json");
  const Json manifest = Json::Parse(std::string((std::istreambuf_iterator<char>(file)), {}));
  if (manifest.Has("channels") && manifest["channels"].Whole() != 1)
    throw std::runtime_error("this bundle takes several channels, and this example one: export it without --channels");

  const std::vector<Json>& known = manifest["classes"].List();
  std::vector<int64_t> ids;
  const std::vector<std::string> names = Split(asked);
  for (const std::string& name : names) {
    size_t id = 0;
    while (id < known.size() && known[id].Text() != name) ++id;
    if (id == known.size()) throw std::runtime_error("no class '" + name + "': it knows " + Joined(known));
    if (std::count(names.begin(), names.end(), name) > 1) throw std::runtime_error("'" + name + "' is asked for twice");
    ids.push_back(static_cast<int64_t>(id));
  }

  const Wav wav = ReadWav(audio);
  if (wav.rate_hz != manifest["sample_rate_hz"].Whole())
    throw std::runtime_error(audio + " has " + std::to_string(wav.rate_hz) + " Hz, and this separator takes " +
                             std::to_string(manifest["sample_rate_hz"].Whole()) + " Hz: resample it first");
  const Json& said = manifest["chunking"];
  const Chunking chunking{said["clip_samples"].Whole(), said["context_samples"].Whole(),
                          said["crossfade_samples"].Whole(), said["align_samples"].Whole()};

  const Json* graph = nullptr;
  for (const Json& one : manifest["graphs"].List())
    if (one["kind"].Text() == "separator" && (graph == nullptr || one["precision"].Text() == "fp32")) graph = &one;
  if (graph == nullptr) throw std::runtime_error("the bundle has no graph from waveform to waveforms (--spectral)");

  // One chunk a call. A graph of fixed shapes takes the last source again where fewer are asked for.
  size_t width = names.size(), rows = 1;
  bool goes_unseen = manifest["visual"].List().empty(), fixed = false;
  for (const Json& one : (*graph)["inputs"].List()) {
    goes_unseen = goes_unseen || one["name"].Text() == "seen";
    if (one["name"].Text() != "class_ids") continue;
    if (!one["shape"].List()[0].IsText()) rows = static_cast<size_t>(one["shape"].List()[0].Whole());
    if ((fixed = !one["shape"].List()[1].IsText())) width = static_cast<size_t>(one["shape"].List()[1].Whole());
  }
  if (!goes_unseen) throw std::runtime_error("this separator must see its sources, and this example shows it nothing");
  const bool independent = !manifest.Has("independent_sources") || manifest["independent_sources"].IsTrue();
  if (fixed && !independent && names.size() != width)
    throw std::runtime_error("this bundle separates " + std::to_string(width) +
                             " sources at once: export it with --sources " + std::to_string(names.size()));

  std::vector<Input> inputs;
  for (const Json& one : (*graph)["inputs"].List()) {
    Input input{one["name"].Text(), one["dtype"].Text(), {}, {}};
    size_t count = 1;
    for (const Json& size : one["shape"].List()) {
      const size_t open = size.IsText() && size.Text() == "batch" ? rows : width;
      input.shape.push_back(size.IsText() ? static_cast<int64_t>(open) : size.Whole());
      count *= static_cast<size_t>(input.shape.back());
    }
    input.bytes.assign(count * SizeOf(input.type), 0);  // features of what is not seen are zeros, and `seen` is false
    if (input.name == "motion_mask") Fill<char>(input, 1);
    inputs.push_back(std::move(input));
  }

  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "avsep");
  Ort::Session session(environment, (folder / (*graph)["file"].Text()).c_str(), Ort::SessionOptions{});
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<const char*> input_names;
  std::vector<Ort::Value> values;  // views of the inputs' bytes
  for (Input& input : inputs) {
    input_names.push_back(input.name.c_str());
    values.push_back(Ort::Value::CreateTensor(memory, input.bytes.data(), input.bytes.size(), input.shape.data(),
                                              input.shape.size(), TypeOf(input.type)));
  }
  const auto find = [&inputs](const char* name) -> Input& {
    for (Input& input : inputs)
      if (input.name == name) return input;
    throw std::runtime_error(std::string("the graph takes no ") + name);
  };
  float* mixture = reinterpret_cast<float*>(find("mixture").bytes.data());
  int64_t* class_ids = reinterpret_cast<int64_t*>(find("class_ids").bytes.data());
  const char* output_names[] = {"sources"};

  const long long total = static_cast<long long>(wav.samples.size());
  std::vector<std::vector<float>> sources(names.size(), std::vector<float>(wav.samples.size(), 0.0f));
  for (const Chunk& chunk : PlanChunks(total, chunking)) {
    const long long there = std::min(chunking.clip, total - chunk.start);
    for (size_t row = 0; row < rows; ++row) {
      float* place = mixture + row * chunking.clip;
      std::fill(place, place + chunking.clip, 0.0f);
      std::copy_n(wav.samples.begin() + chunk.start, there, place);
    }
    for (size_t first = 0; first < names.size(); first += width) {
      for (size_t i = 0; i < rows * width; ++i) class_ids[i] = ids[std::min(first + i % width, names.size() - 1)];
      std::vector<Ort::Value> answer = session.Run(Ort::RunOptions{nullptr}, input_names.data(), values.data(),
                                                   values.size(), output_names, 1);
      const float* estimates = answer[0].GetTensorData<float>();  // [rows, width, clip]
      for (size_t i = 0; i < width && first + i < names.size(); ++i)
        Add(sources[first + i], estimates + i * chunking.clip, chunk, chunking);
    }
  }

  std::vector<float> sum(wav.samples.size(), 0.0f), residual(wav.samples);
  for (const std::vector<float>& source : sources)
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += source[i];
  for (size_t i = 0; i < sum.size(); ++i) residual[i] -= sum[i];
  std::filesystem::create_directories(out);
  const std::string stem = std::filesystem::path(audio).stem().string();
  const auto write = [&](const std::string& name, const std::vector<float>& samples) {
    const std::string path = (out / (stem + "_" + FileName(name) + ".wav")).string();
    WriteWav(path, samples, wav.rate_hz);
    std::printf("%s\n", path.c_str());
  };
  for (size_t i = 0; i < names.size(); ++i) write(names[i], sources[i]);
  write("residual", residual);
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) {
    std::fprintf(stderr, "usage: %s BUNDLE recording.wav CLASS,CLASS OUT\n", words[0]);
    return 2;
  }
  try {
    Separate(words[1], words[2], words[3], words[4]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "separate: %s\n", error.what());
    return 2;
  }
  return 0;
}
