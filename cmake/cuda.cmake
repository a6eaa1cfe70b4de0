# Finds nvcc and enables CUDA. Nothing of CUDA is needed, or looked at further, where V3B_CUDA ends as OFF.
if(NOT V3B_CUDA STREQUAL "OFF" AND NOT CMAKE_CUDA_COMPILER)
  find_program(V3B_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin
               PATHS /usr/local/cuda/bin)
  if(V3B_NVCC)
    set(CMAKE_CUDA_COMPILER ${V3B_NVCC})
  elseif(V3B_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA: no nvcc in PATH or /usr/local/cuda: CPU only; kernels are built for the emulation")
  else()
    message(FATAL_ERROR "V3B_CUDA=ON, but there is no nvcc in PATH, $CUDA_PATH/bin or /usr/local/cuda/bin")
  endif()
endif()
if(V3B_CUDA STREQUAL "OFF" OR NOT CMAKE_CUDA_COMPILER)
  set(V3B_CUDA OFF)
  return()
endif()
set(V3B_CUDA ON)

# What each architecture is for: 80 A100 (and 8.6, 8.9 by binary compatibility); 90a Hopper with wgmma and TMA;
# 100 Blackwell without its own tensor instructions; PTX of 90 for whatever comes later.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real 90-virtual)
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc 13 does
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

find_package(CUDAToolkit REQUIRED)
find_package(Python3 REQUIRED COMPONENTS Interpreter)  # scripts/cuda_resources.py

# CUTLASS is headers from PyPI (nvidia-cutlass). Kernels in files named *cutlass* are left out without them.
find_path(V3B_CUTLASS_INCLUDE cutlass/cutlass.h NO_DEFAULT_PATH PATHS
  ${V3B_DEPS_DIR}/cutlass/include ${V3B_DEPS_DIR}/cutlass/cutlass_library/source/include /usr/local/cuda/include)
if(NOT V3B_CUTLASS_INCLUDE)
  message(STATUS "CUDA: no CUTLASS headers in ${V3B_DEPS_DIR}/cutlass: files named *cutlass* are left out "
                 "(scripts/install_deps.sh --cuda fetches them)")
endif()
# cuDNN's attention is a baseline: its headers and those of its frontend. The library itself is opened at run time.
find_path(V3B_CUDNN_INCLUDE cudnn_frontend.h NO_DEFAULT_PATH PATHS ${V3B_DEPS_DIR}/cudnn/include)
if(NOT V3B_CUDNN_INCLUDE)
  message(STATUS "CUDA: no cuDNN headers in ${V3B_DEPS_DIR}/cudnn (scripts/install_deps.sh --cudnn): *.cuda_cudnn say so")
endif()
