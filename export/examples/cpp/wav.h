// WAV files: 16-bit integers and 32-bit floats in, 32-bit floats out. The processor must be little-endian, as WAV is.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

struct Wav {
  uint32_t rate_hz = 0;
  std::vector<float> samples;  // mono: the mean of the channels
};

inline uint32_t Number(const std::string& bytes, size_t at, int size) {
  uint32_t value = 0;
  for (int i = 0; i < size; ++i) value |= static_cast<uint32_t>(static_cast<unsigned char>(bytes.at(at + i))) << 8 * i;
  return value;
}

inline Wav ReadWav(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no such audio file: " + path);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  if (bytes.size() < 12 || bytes.compare(0, 4, "RIFF") != 0 || bytes.compare(8, 4, "WAVE") != 0)
    throw std::runtime_error(path + " is no WAV file: convert it first (ffmpeg -i IN OUT.wav)");
  uint32_t kind = 0, channels = 0, bits = 0;
  Wav wav;
  for (size_t at = 12; at + 8 <= bytes.size();) {
    const std::string name = bytes.substr(at, 4);
    const size_t size = Number(bytes, at + 4, 4), start = at + 8;
    if (name == "fmt " && start + 16 <= bytes.size()) {
      kind = Number(bytes, start, 2);
      channels = Number(bytes, start + 2, 2);
      wav.rate_hz = Number(bytes, start + 4, 4);
      bits = Number(bytes, start + 14, 2);
      if (kind == 0xFFFE && start + 26 <= bytes.size()) kind = Number(bytes, start + 24, 2);  // WAVE_FORMAT_EXTENSIBLE
    } else if (name == "data") {
      const bool is_float = kind == 3 && bits == 32;
      if ((!is_float && !(kind == 1 && bits == 16)) || channels == 0)
        throw std::runtime_error(path + " holds other samples than 16-bit integers or 32-bit floats: convert it first");
      if (start + size > bytes.size()) throw std::runtime_error(path + " is truncated: copy it again");
      const size_t width = bits / 8, frames = size / (width * channels);
      wav.samples.resize(frames);
      for (size_t i = 0; i < frames; ++i) {
        double sum = 0;
        for (uint32_t c = 0; c < channels; ++c) {
          const char* place = bytes.data() + start + (i * channels + c) * width;
          if (is_float) {
            float value;
            std::memcpy(&value, place, 4);
            sum += value;
          } else {
            int16_t value;
            std::memcpy(&value, place, 2);
            sum += value / 32768.0;
          }
        }
        wav.samples[i] = static_cast<float>(sum / channels);
      }
      if (frames == 0) break;
      return wav;
    }
    at = start + size + size % 2;
  }
  throw std::runtime_error(path + " holds no samples");
}

inline void WriteWav(const std::string& path, const std::vector<float>& samples, uint32_t rate_hz) {
  std::string head;
  const auto put = [&head](uint32_t value, int size) {
    for (int i = 0; i < size; ++i) head += static_cast<char>(value >> 8 * i & 0xFF);
  };
  const uint32_t size = static_cast<uint32_t>(samples.size() * 4);
  head += "RIFF";
  put(size + 50, 4);
  head += "WAVEfmt ";
  put(18, 4);
  put(3, 2);  // floats
  put(1, 2);
  put(rate_hz, 4);
  put(rate_hz * 4, 4);
  put(4, 2);
  put(32, 2);
  put(0, 2);
  head += "fact";
  put(4, 4);
  put(static_cast<uint32_t>(samples.size()), 4);
  head += "data";
  put(size, 4);
  std::ofstream file(path, std::ios::binary);
  file << head;
  file.write(reinterpret_cast<const char*>(samples.data()), size);
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}
