// A reader of JSON, as much as a bundle's manifest takes: whole numbers and fractions are doubles, text is UTF-8.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kText, kList, kObject };

  static Json Parse(const std::string& text) {
    Reader reader{text, 0};
    Json value = reader.Value(0);
    reader.Space();
    if (reader.at != text.size()) reader.Fail("something stands behind its end");
    return value;
  }

  const Json& operator[](const std::string& key) const {
    auto found = object_.find(key);
    if (found == object_.end()) throw std::runtime_error("the manifest says nothing of '" + key + "'");
    return found->second;
  }
  bool Has(const std::string& key) const { return object_.count(key) > 0; }
  const std::vector<Json>& List() const { return Of(Kind::kList).list_; }
  const std::string& Text() const { return Of(Kind::kText).text_; }
  double Number() const { return Of(Kind::kNumber).number_; }
  long long Whole() const { return static_cast<long long>(Number()); }
  bool IsTrue() const { return Of(Kind::kBool).number_ != 0; }
  bool IsText() const { return kind_ == Kind::kText; }

 private:
  struct Reader {
    const std::string& text;
    size_t at;

    [[noreturn]] void Fail(const std::string& why) const {
      throw std::runtime_error("manifest.json cannot be read at byte " + std::to_string(at) + ": " + why);
    }
    void Space() {
      while (at < text.size() && std::string(" \t\r\n").find(text[at]) != std::string::npos) ++at;
    }
    char Next() {
      if (at >= text.size()) Fail("it ends early");
      return text[at++];
    }
    void Expect(const std::string& word) {
      if (text.compare(at, word.size(), word) != 0) Fail("expected " + word);
      at += word.size();
    }

    Json Value(int depth) {
      if (depth > 100) Fail("it is nested too deeply");
      Space();
      if (at >= text.size()) Fail("it ends early");
      Json value;
      switch (text[at]) {
        case '{': {
          value.kind_ = Kind::kObject;
          for (char sign = Next(); sign != '}';) {
            Space();
            if (sign == '{' && at < text.size() && text[at] == '}') {
              ++at;
              break;
            }
            std::string key = String();
            Space();
            Expect(":");
            value.object_[key] = Value(depth + 1);
            Space();
            sign = Next();
            if (sign != ',' && sign != '}') Fail("expected , or }");
          }
          return value;
        }
        case '[': {
          value.kind_ = Kind::kList;
          for (char sign = Next(); sign != ']';) {
            Space();
            if (sign == '[' && at < text.size() && text[at] == ']') {
              ++at;
              break;
            }
            value.list_.push_back(Value(depth + 1));
            Space();
            sign = Next();
            if (sign != ',' && sign != ']') Fail("expected , or ]");
          }
          return value;
        }
        case '"':
          value.kind_ = Kind::kText;
          value.text_ = String();
          return value;
        case 't':
          Expect("true");
          value.kind_ = Kind::kBool;
          value.number_ = 1;
          return value;
        case 'f':
          Expect("false");
          value.kind_ = Kind::kBool;
          return value;
        case 'n':
          Expect("null");
          return value;
        default: {
          size_t end = at;
          while (end < text.size() && std::string("+-.0123456789eE").find(text[end]) != std::string::npos) ++end;
          if (end == at) Fail("expected a value");
          value.kind_ = Kind::kNumber;
          value.number_ = std::strtod(text.substr(at, end - at).c_str(), nullptr);
          at = end;
          return value;
        }
      }
    }

    unsigned Unit() {  // four hexadecimal digits
      if (at + 4 > text.size()) Fail("it ends early");
      char* end = nullptr;
      const std::string digits = text.substr(at, 4);
      const unsigned unit = static_cast<unsigned>(std::strtoul(digits.c_str(), &end, 16));
      if (end != digits.c_str() + 4) Fail("expected four hexadecimal digits");
      at += 4;
      return unit;
    }

    std::string String() {
      if (Next() != '"') Fail("expected text");
      std::string made;
      for (char c = Next(); c != '"'; c = Next()) {
        if (c != '\\') {
          made += c;
          continue;
        }
        c = Next();
        const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
        const size_t place = from.find(c);
        if (place != std::string::npos) {
          made += to[place];
          continue;
        }
        if (c != 'u') Fail("an unknown escape");
        unsigned code = Unit();
        if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
          Expect("\\u");
          code = 0x10000 + ((code - 0xD800) << 10) + (Unit() - 0xDC00);
        }
        if (code < 0x80) {
          made += static_cast<char>(code);
        } else if (code < 0x800) {
          made += static_cast<char>(0xC0 | code >> 6);
          made += static_cast<char>(0x80 | (code & 0x3F));
        } else if (code < 0x10000) {
          made += static_cast<char>(0xE0 | code >> 12);
          made += static_cast<char>(0x80 | (code >> 6 & 0x3F));
          made += static_cast<char>(0x80 | (code & 0x3F));
        } else {
          made += static_cast<char>(0xF0 | code >> 18);
          made += static_cast<char>(0x80 | (code >> 12 & 0x3F));
          made += static_cast<char>(0x80 | (code >> 6 & 0x3F));
          made += static_cast<char>(0x80 | (code & 0x3F));
        }
      }
      return made;
    }
  };

  const Json& Of(Kind kind) const {
    if (kind_ != kind) throw std::runtime_error("the manifest holds another kind of value than expected");
    return *this;
  }

  Kind kind_ = Kind::kNull;
  double number_ = 0;
  std::string text_;
  std::vector<Json> list_;
  std::map<std::string, Json> object_;
};
