// Reads golden.bin (written by make_golden.py): a row of records, each a line "name type d0 d1 ...\n" and then the
// values.
#pragma once
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "../common.h"

struct Golden {
    template <class T>
    struct Tensor {
        std::vector<int> shape;
        std::vector<T> values;
    };
    std::map<std::string, Tensor<float>> floats;
    std::map<std::string, Tensor<int>> integers;

    explicit Golden(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        if (!file)
            fail("cannot open %s: run the tests where they were built, or write it with test/make_golden.py",
                 path.c_str());
        for (std::string line; std::getline(file, line);) {
            std::istringstream header(line);
            std::string name, type;
            header >> name >> type;
            if (type == "f32") read(file, header, floats[name]);
            else if (type == "i32") read(file, header, integers[name]);
            else fail("%s: record %s has type '%s'", path.c_str(), name.c_str(), type.c_str());
            if (!file) fail("%s: record %s is cut short", path.c_str(), name.c_str());
        }
    }
    const std::vector<float>& operator[](const std::string& name) const { return find(floats, name).values; }
    const std::vector<int>& ints(const std::string& name) const { return find(integers, name).values; }
    const std::vector<int>& shape(const std::string& name) const { return find(floats, name).shape; }

  private:
    template <class T>
    static void read(std::istream& file, std::istream& header, Tensor<T>& tensor) {
        size_t count = 1;
        for (int d; header >> d; count *= d) tensor.shape.push_back(d);
        tensor.values.resize(count);
        file.read(reinterpret_cast<char*>(tensor.values.data()), count * sizeof(T));
    }
    template <class T>
    static const Tensor<T>& find(const std::map<std::string, Tensor<T>>& tensors, const std::string& name) {
        const auto found = tensors.find(name);
        if (found == tensors.end())
            fail("golden.bin has no record %s: write it again with test/make_golden.py", name.c_str());
        return found->second;
    }
};
