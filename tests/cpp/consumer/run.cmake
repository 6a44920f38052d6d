# Builds examples/cpp as a third party would, against the installed package, and runs a short form of it.
# Needs -DCCTORCH_BUILD_DIR -DEXAMPLE_DIR -DWORK_DIR -DGENERATOR.

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(output "${output}" PARENT_SCOPE)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}\nended with ${code}:\n${output}")
  endif()
endfunction()

function(expect_failure expected_code text)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(FIND "${output}" "${text}" position)
  if(NOT code EQUAL expected_code OR position EQUAL -1)
    message(FATAL_ERROR "${ARGN}\nended with ${code}, expected ${expected_code} and \"${text}\":\n${output}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR}/prefix ${WORK_DIR}/run)
run(${CMAKE_COMMAND} --install ${CCTORCH_BUILD_DIR} --component Unspecified --prefix ${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} -S ${EXAMPLE_DIR} -B ${WORK_DIR}/build -G ${GENERATOR} -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)

set(train_resnet ${WORK_DIR}/build/train_resnet)
run(${train_resnet} --help)
expect_failure(2 "--target 1.5: expected a number from" ${train_resnet} --target 1.5)
expect_failure(2 "--epoch: no such option" ${train_resnet} --epoch 3)
expect_failure(1 "no such file" ${train_resnet} --data ${WORK_DIR}/nothing --out ${WORK_DIR}/run)

run(${train_resnet} --synthetic --blocks 1 --epochs 4 --finetune-epochs 3 --batch 64 --device cpu --target 0.5
    --out ${WORK_DIR}/run)
message("${output}")

file(READ ${WORK_DIR}/run/summary.json summary)
foreach(key top1_after macs_before macs_nominal macs_after)
  string(JSON ${key} GET ${summary} ${key})
endforeach()
# Ten classes: chance is 10 %.
if(NOT top1_after GREATER 80)
  message(FATAL_ERROR "top-1 after fine-tuning is ${top1_after} %, expected more than 80 %")
endif()
math(EXPR most_macs "${macs_before} * 51 / 100")
if(macs_after GREATER most_macs OR macs_after GREATER macs_nominal)
  message(FATAL_ERROR "MACs: ${macs_before} before, ${macs_nominal} nominal, ${macs_after} after; expected half of them or less")
endif()
