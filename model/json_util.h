// Private to model/: JSON text -> nlohmann value with duplicate keys, absurd depth and syntax
// errors turned into v3b::Error. Only .cpp files of model/ include this (it pulls in
// nlohmann/json.hpp).
#pragma once
#include <nlohmann/json.hpp>
#include <string>

namespace v3b::model {

// Throws bad_input naming `where`; objects with a key given twice are rejected (RFC 8259 leaves
// them open).
nlohmann::json parse_json(const std::string& text, const std::string& where);
// Whole file as text. not_found when it is missing, bad_input when unreadable or larger than
// max_bytes.
std::string read_text_file(const std::string& path, int64_t max_bytes);
// Short printable form of a value for "found ..." (cut at 60 characters).
std::string brief(const nlohmann::json& v);

}  // namespace v3b::model
