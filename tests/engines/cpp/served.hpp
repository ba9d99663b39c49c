// A runtime that is asked line by line, so that one process serves many bundles.
#pragma once

#include <iosfwd>

// Answers each line of `requests` with one line: "ok" and what was asked for, or "refused" and why.
//
//     open BUNDLE MODE THREADS MEMORY DIGEST    a digest of - is none; what was open is closed
//     run TASK ADAPTED INPUT...                 an input, as an output, is NAME:DTYPE:1x2:HEX
//     use TASK | held INPUT... | release        one task, kept in use
//     preload TASK | evict TASK | reload DIGEST | loaded | tasks | digest | close
//     race COUNT BUNDLE MODE TASK INPUT...      how often each answer came of as many opens
void serve(std::istream& requests, std::ostream& answers);
