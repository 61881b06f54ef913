// Loops of nothing but multiply-adds in registers, written in assembly: a compiler spills or drops what it sees through.
#pragma once

namespace llamaclust {

// Some microseconds of work; returns its multiply-adds.
using ArithmeticPiece = double (*)();

ArithmeticPiece int8_piece();  // by the widest 8-bit dot product this CPU has
ArithmeticPiece fma_piece();   // float32

}  // namespace llamaclust
